"""Writes an export of any format. It is kept only if the format's own reader accepts it, and if it agrees with the
model on real images.

The batch size is dynamic, the image size fixed. The file contains class names and preprocessing, but no paths of this
machine. The same weights give the same bytes.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn as nn

from convmixer._version import __version__
from convmixer.data.argument import BUILT_IN, HUB
from convmixer.data.options import Options
from convmixer.errors import RequestError
from convmixer.exported.check import Images, batches, compare, real_images
from convmixer.exported.formats import Format, format_named
from convmixer.exported.quiet import quiet
from convmixer.exported.samples import choose_samples
from convmixer.exported.source import Source, prepared
from convmixer.preprocess import Preprocessing
from convmixer.run_folder import RunFolder, is_run, is_web_export
from convmixer.text import terminal


def export(
    weights: str,
    format: str = "onnx",
    precision: str = "fp32",
    out: Path | None = None,
    data: str | None = None,
    limit: int | None = None,
    samples: str | None = None,
    expected: dict[str, Any] | None = None,
    options: Options | None = None,
) -> dict[str, Any]:
    """Export weights to a file or web folder, and print and return how well it agrees with them.

    Args:
        weights: See `load_model`.
        format: A name in `formats.FORMATS`.
        precision: "fp32", "fp16" or "int8".
        out: The file or folder to write; default: in the run folder's `exports`, else in the current folder.
        data: Data set for the check and for the calibration of int8; default: the one the weights were trained on.
        limit: Number of images to check on; default: 1000, or 64 if the input is larger than 64 pixels.
        samples: Pictures that the web page offers: a run, a folder of images, or "none", which is the default.
        expected: Overrides of the weights' input settings, see `inference.load_classifier`.
        options: What the user said about the columns, folders and groups of `data`.

    Raises:
        RequestError: The weights, format, precision or data cannot be used.
        ExportError: The file does not agree with the model.
    """
    from convmixer.models.weights import load_model

    kind = format_named(format)
    _check_flags(kind, precision, out, limit, samples)
    loaded = load_model(weights, **(expected or {}))
    print(terminal(f"{weights}: {loaded.found}"))
    images = real_images(loaded, data, limit, options)
    path = out or default_path(weights, kind, precision)
    pictures, said = choose_samples(samples)
    about = {"architecture": loaded.metadata.get("name"), "model_args": loaded.metadata.get("model_args")}
    about["data"] = _shareable(loaded.metadata.get("data"))
    p, classes = loaded.preprocessing, loaded.classes
    result = export_model(loaded.model, classes, p, images, path, format, precision, about, pictures)
    _print(result)
    if kind.folder:
        print(f"{terminal(said)}{'; everybody who opens the page sees them' if pictures else ''}")
        if p.bits < 16:
            asked = f"the model reads them as {p.bits}-bit images, which a browser cannot do"
            print(f"the page refuses 16-bit grey PNG files: {asked}")
    return result


def export_model(
    model: nn.Module,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    images: Images,
    path: Path,
    format: str = "onnx",
    precision: str = "fp32",
    about: dict[str, Any] | None = None,
    pictures: Sequence[bytes] = (),
) -> dict[str, Any]:
    """Write a model to a file (for "web" a folder), check that the two agree, and return how well they do.

    Args:
        model: Maps (B, C, H, W) to (B, classes); it is not changed.
        classes: Class names in the order of the outputs.
        preprocessing: How an image becomes the input.
        images: Real images to check on, and to calibrate int8 with.
        path: The file or folder to write. A file replaces a file; a web folder replaces an older web export or an
            empty folder. Anything else at the path is an error.
        format: A name in `formats.FORMATS`.
        precision: One of the format's precisions.
        about: Further facts to store in the file, e.g. the architecture.
        pictures: PNG or JPEG files that the web page offers.

    Returns:
        `file`, `size_bytes`, `images`, `max_logit_difference`, `top1_agreement` (percent) and, if the labels are
        known, `top1_model` and `top1_export` (percent).

    Raises:
        RequestError: The format has no such precision, there are no training images for int8, or something else is at
            the path.
        ExportError: The file does not agree with the model.
    """
    kind = format_named(format)
    _check_precision(kind, precision)
    if precision == "int8" and not len(images.calibration):
        raise RequestError("int8 is calibrated on training images: name the data set with --data")
    _check_target(path, kind)
    facts = {"precision": precision, "exported_by": f"convmixer {__version__}", **(about or {})}
    whole, outputs = prepared(model)
    calibration = list(batches(images.calibration, preprocessing)) if precision == "int8" else []
    source = Source(whole, outputs, tuple(classes), preprocessing, facts, precision, calibration, pictures)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        module = kind.load_module()
        with quiet():
            module.write(draft, source)
            module.check(draft)
        report = compare(whole, draft, preprocessing, images, precision)
        files = [file for part in kind.parts(draft) for file in (part, *part.rglob("*")) if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        _publish(draft, path, kind)
    return {"file": str(path), "format": format, "precision": precision, "size_bytes": size, **report}


def default_path(weights: str, kind: Format, precision: str) -> Path:
    """Return the path of an export without `--out`: in RUN/exports/, or for other weights in the current folder."""
    stem = Path(weights).name.removesuffix(".safetensors").replace("/", "-") or "model"
    return (RunFolder(weights).exports if is_run(weights) else Path()) / f"{stem}-{precision}{kind.suffix}"


def _check_flags(kind: Format, precision: str, out: Path | None, limit: int | None, samples: str | None) -> None:
    _check_precision(kind, precision)
    if samples is not None and not kind.folder:
        raise RequestError(f"--samples is for --format web, not {kind.name}")
    if limit is not None and limit < 1:
        raise RequestError(f"--limit must be at least 1, not {limit}")
    if out is not None and not kind.folder and out.suffix != kind.suffix:
        raise RequestError(f"--out {out} must end in {kind.suffix} for {kind.name}")


def _check_precision(kind: Format, precision: str) -> None:
    if precision not in kind.precisions:
        raise RequestError(f"{kind.name} is exported as {' or '.join(kind.precisions)}, not {precision}")


def _shareable(data: Any) -> dict[str, Any] | None:
    """Return metadata for an export, without this machine's paths and this user's seal."""
    if not isinstance(data, dict):
        return None
    spec = str(data.get("spec"))
    hidden = {"seal"} if spec in BUILT_IN or spec.startswith(HUB) else {"seal", "spec"}
    return _without_paths({name: value for name, value in data.items() if name not in hidden})


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in values.items() if not os.path.isabs(str(value))}
    return {name: _without_paths(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _print(result: dict[str, Any]) -> None:
    print(f"{result['file']} ({result['size_bytes'] / 1e6:.2f} MB)")
    print(
        f"on {result['images']} images ({result['images_from']}): largest logit difference "
        f"{result['max_logit_difference']:.3g}, same top-1 on {result['top1_agreement']:.2f}%"
    )
    if "top1_model" in result:
        cost = result["top1_model"] - result["top1_export"]
        print(f"top-1 {result['top1_export']:.2f}%; the model has {result['top1_model']:.2f}% (cost {cost:.2f})")


def _check_target(path: Path, kind: Format) -> None:
    """Check that what is at a path may be replaced: a file by a file; an empty folder or web export by a web export.

    Raises:
        RequestError: Something else is at the path.
    """
    if kind.folder:
        taken = path.is_symlink() or (path.exists() and not path.is_dir())
        if taken or (path.is_dir() and any(path.iterdir()) and not is_web_export(path)):
            raise RequestError(f"{path} exists and is not an exported page: choose another --out")
    elif path.is_dir():
        raise RequestError(f"{path} is a folder: name a file that ends in {kind.suffix}")


def _publish(draft: Path, path: Path, kind: Format) -> None:
    """Move a finished export to its final path."""
    if kind.folder and path.exists():
        old = draft.with_name(f"{draft.name}.old")
        path.rename(old)
        draft.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        return
    for part, place in zip(reversed(kind.parts(draft)), reversed(kind.parts(path)), strict=True):
        part.replace(place)  # the main file of the export comes last
