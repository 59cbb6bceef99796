"""Export to ONNX, OpenVINO, torch.export and a web page, each checked against the model before it is left on disk.

The batch is dynamic, the image size fixed. Class names and preprocessing travel inside the file. Not here: running
exported files (`exported/load.py`).
"""

import base64
import copy
import gzip
import json
import logging
import lzma
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

import convmixer
from convmixer.errors import RequestError
from convmixer.exported.load import open_exported
from convmixer.exported.onnx import import_onnxruntime
from convmixer.exported.openvino import import_openvino
from convmixer.exported.samples import choose_samples
from convmixer.exported.web import data_uri
from convmixer.models.maps import WithMaps, has_maps
from convmixer.preprocess import Preprocessing, load_image, preprocess, to_mode
from convmixer.run_folder import RunFolder, is_run, sample_files

if TYPE_CHECKING:
    from convmixer.evaluation.data import EvaluationData
    from convmixer.models.weights import LoadedModel

PRECISIONS = {
    "onnx": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "fp16", "int8"),
    "torch": ("fp32",),
    "web": ("fp32", "fp16", "int8"),
}
FORMATS = tuple(PRECISIONS)
SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2", "web": "-web"}
# Largest logit difference allowed, as a share of the largest logit, and least share of equal top-1. int8 is judged by
# the accuracy printed; the bound only catches an export that is broken.
TOLERANCE = {"fp32": (1e-3, 0.995), "fp16": (5e-2, 0.98), "int8": (float("inf"), 0.8)}


CALIBRATION = 512  # training images; an eighth of them above SMALL_SIDE
SMALL_SIDE = 64  # up to this input size a thousand images are checked, above it fewer, to stay within a minute


class ExportError(RuntimeError):
    """The exported file does not agree with the model; nothing was left on disk."""


@dataclass(frozen=True)
class Images:
    """Real images for the check and the calibration.

    Args:
        name: Where they are from.
        check: Images that the file and the model are compared on.
        labels: Their classes, or None where they are not the model's.
        calibration: Training images, for int8; empty where there are none.
    """

    name: str
    check: Sequence[Image.Image]
    labels: np.ndarray | None
    calibration: Sequence[Image.Image]


def export(
    weights: str,
    format: str = "onnx",
    precision: str = "fp32",
    out: Path | None = None,
    data: str | None = None,
    limit: int | None = None,
    samples: str | None = None,
) -> dict[str, Any]:
    """Export weights to a file or web folder, print how well it agrees with them, and return that.

    Args:
        weights: Whatever `load_model` takes.
        format: "onnx", "openvino", "torch" or "web".
        precision: "fp32", "fp16" or "int8".
        out: The file or folder to write; default: in the run folder's `exports`, else in the current folder.
        data: Data set for the check and for the calibration of int8; default: the one the weights were trained on.
        limit: Images to check on; default: 1000, or 64 where the input is larger than 64 pixels.
        samples: Pictures for the web page to offer: a run, a folder of images, or "none", which is the default.

    Raises:
        RequestError: The weights, format, precision or data cannot be used.
        ExportError: The file does not agree with the model.
    """
    from convmixer.models.weights import load_model

    if samples is not None and format != "web":
        raise RequestError(f"--samples is for --format web, not {format}")
    if limit is not None and limit < 1:
        raise RequestError(f"--limit must be at least 1, not {limit}")
    loaded = load_model(weights)
    p = loaded.preprocessing
    images = real_images(loaded, data, limit or (1000 if p.img_size <= SMALL_SIDE else 64))
    path = out or default_path(weights, format, precision)
    if out is not None and format != "web" and out.suffix != SUFFIX[format]:
        raise RequestError(f"--out {out} must end in {SUFFIX[format]} for {format}")
    about = {"architecture": loaded.metadata.get("name")} | {
        key: loaded.metadata.get(key) for key in ("model_args", "data")
    }
    pictures, said = choose_samples(samples)
    result = export_model(loaded.model, loaded.classes, p, images, path, format, precision, about, pictures)
    _print(result)
    if format == "web":
        print(f"{said}{'; whoever gets the page sees them' if pictures else ''}")
    return result


def real_images(loaded: "LoadedModel", data: str | None, limit: int) -> Images:
    """Return images to check and calibrate on: those of `find_data`, else files beside the weights.

    Args:
        loaded: The model; its metadata name the data set that it was trained on.
        data: Another data set, or None.
        limit: Number of images to check on.

    Raises:
        RequestError: `data` is given and cannot be loaded.
    """
    from convmixer.evaluation.data import find_data

    try:
        found = find_data(data, loaded.metadata, loaded.source)
    except RequestError as error:
        if data:
            raise
        print(f"not checked on the data of the training: {error}")
    else:
        return _of_data(found, loaded, limit)
    chans = loaded.preprocessing.in_chans
    files = sample_files(loaded.source)
    if files:
        return Images("the samples beside the weights", [load_image(file, chans) for file in files], None, ())
    return Images("photographs of scikit-learn", _photographs(64, chans), None, ())


def _of_data(data: "EvaluationData", loaded: "LoadedModel", limit: int) -> Images:
    splits = data.splits
    held_out = next(part for part in (splits.test, splits.val, splits.train) if part is not None)
    order = np.random.default_rng(0).permutation(len(held_out))[:limit]
    found = [item for i in order if (item := held_out.read(int(i))) is not None]
    calibration: list[Image.Image] = []
    if splits.train is not None:
        count = CALIBRATION if loaded.preprocessing.img_size <= SMALL_SIDE else CALIBRATION // 8
        chosen = np.random.default_rng(1).permutation(len(splits.train))[:count]
        calibration = [item[0] for i in chosen if (item := splits.train.read(int(i))) is not None]
    labels = np.array([label for _, label in found]) if splits.classes == loaded.classes else None
    return Images(splits.name, [image for image, _ in found], labels, calibration)


def _photographs(count: int, in_chans: int) -> list[Image.Image]:
    """Return square cut-outs of two photographs, of many sizes."""
    from sklearn.datasets import load_sample_images

    photographs = [to_mode(Image.fromarray(pixels), in_chans) for pixels in load_sample_images().images]
    random = np.random.default_rng(0)
    cuts = []
    for number in range(count):
        image = photographs[number % len(photographs)]
        side = int(random.integers(32, min(image.size)))
        left, top = (int(random.integers(0, length - side + 1)) for length in image.size)
        cuts.append(image.crop((left, top, left + side, top + side)))
    return cuts


def default_path(weights: str, format: str, precision: str) -> Path:
    """Return where an export goes that was not told: RUN/exports/, or the current folder for weights elsewhere."""
    stem = Path(weights).name.removesuffix(".safetensors").replace("/", "-") or "model"
    return (RunFolder(weights).exports if is_run(weights) else Path()) / f"{stem}-{precision}{SUFFIX[format]}"


def _print(result: dict[str, Any]) -> None:
    print(f"{result['file']} ({result['size_bytes'] / 1e6:.2f} MB)")
    print(
        f"on {result['images']} images ({result['images_from']}): largest logit difference "
        f"{result['max_logit_difference']:.3g}, same top-1 on {result['top1_agreement']:.2f}%"
    )
    if "top1_model" in result:
        cost = result["top1_model"] - result["top1_export"]
        print(f"top-1 {result['top1_export']:.2f}% where the model has {result['top1_model']:.2f}% (cost {cost:.2f})")


def export_model(
    model: nn.Module,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    images: Images,
    path: Path,
    format: str = "onnx",
    precision: str = "fp32",
    about: dict[str, Any] | None = None,
    samples: Sequence[bytes] = (),
) -> dict[str, Any]:
    """Write a model to a file (a folder for "web") that agrees with it, and return how well.

    Args:
        model: Maps (B, C, H, W) to (B, classes); it is not changed.
        classes: Class names in the order of the outputs.
        preprocessing: What the model expects of its input.
        images: Real images to check on, and to calibrate int8 with.
        path: The file or folder to write; an older export is replaced, anything else is left alone.
        format: "onnx", "openvino", "torch" or "web".
        precision: "fp32", "fp16" or "int8"; "torch" has fp32 only.
        about: Further facts to store with it, e.g. the architecture.
        samples: Image files offered by the web page.

    Returns:
        `file`, `size_bytes`, `images`, `max_logit_difference`, `top1_agreement` (percent) and, where the labels are
        known, `top1_model` and `top1_export` (percent).

    Raises:
        RequestError: The precision is not available for the format, int8 has no training images, or something else
            lies at the path.
        ExportError: The file does not agree with the model.
    """
    _check_request(format, precision, images)
    _check_target(path, format)
    facts = {
        "classes": list(classes),
        "preprocessing": asdict(preprocessing),
        "about": {"precision": precision, "exported_by": f"convmixer {convmixer.__version__}", **(about or {})},
    }
    texts = {name: json.dumps(value) for name, value in facts.items()}
    model = copy.deepcopy(model).eval().float().cpu()
    with tempfile.TemporaryDirectory(prefix=".export-", dir=_folder(path.parent)) as folder:
        draft = Path(folder) / path.name
        with _quiet():
            _WRITERS[format](model, preprocessing, images, precision, texts, draft, samples)
        report = compare(model, draft, preprocessing, images, precision)
        _publish(draft, path)
    return {"file": str(path), "format": format, "precision": precision, "size_bytes": _size(path), **report}


def compare(
    model: nn.Module, path: Path, preprocessing: Preprocessing, images: Images, precision: str
) -> dict[str, Any]:
    """Return how an exported file's answers on real images differ from the model's.

    Raises:
        ExportError: They differ more than `TOLERANCE`.
    """
    exported = open_exported(path)
    expected, got = [], []
    # uneven batches, so that a file whose batch is not dynamic fails
    for batch in _batches(images.check, preprocessing, sizes=(1, 7, 32)):
        with torch.inference_mode():
            expected.append(model(torch.from_numpy(batch)).numpy())
        got.append(exported.run(batch)[0])
    return _judge(np.concatenate(expected), np.concatenate(got), images, precision)


def _judge(expected: np.ndarray, got: np.ndarray, images: Images, precision: str) -> dict[str, Any]:
    difference = float(np.abs(expected - got).max())
    same = float((expected.argmax(1) == got.argmax(1)).mean())
    report: dict[str, Any] = {"images": len(expected), "images_from": images.name}
    report |= {"max_logit_difference": difference, "top1_agreement": 100 * same}
    if images.labels is not None:
        report["top1_model"] = 100 * float((expected.argmax(1) == images.labels).mean())
        report["top1_export"] = 100 * float((got.argmax(1) == images.labels).mean())
    share, least = TOLERANCE[precision]
    largest = float(np.abs(expected).max())
    if not (difference <= share * max(1.0, largest) and same >= least):  # `not`: NaN must fail too
        raise ExportError(
            f"the exported model does not agree with the original on {len(expected)} images: logits differ by up to "
            f"{difference:.3g} (allowed {share * max(1.0, largest):.3g}), top-1 agrees on {same:.2%} "
            f"(needed {least:.1%}); no file was left"
        )
    return report


def _check_request(format: str, precision: str, images: Images) -> None:
    if precision not in PRECISIONS[format]:
        raise RequestError(f"{format} is exported as {' or '.join(PRECISIONS[format])}, not {precision}")
    if precision == "int8" and not len(images.calibration):
        raise RequestError("int8 is calibrated on training images: name the data set with --data")


def _write_onnx(
    model: nn.Module,
    p: Preprocessing,
    images: Images,
    precision: str,
    texts: dict[str, str],
    path: Path,
    samples: Sequence[bytes] = (),
) -> None:
    import onnx

    program = torch.onnx.export(
        _traced(model),
        (_example(p),),
        dynamo=True,
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        input_names=["images"],
        output_names=["logits", "maps"] if has_maps(model) else ["logits"],
        verbose=False,
    )
    assert program is not None
    proto = _onnx_in(precision, program.model_proto, p, images, path)
    onnx.helper.set_model_props(proto, texts)
    onnx.save(proto, path)


def _onnx_in(precision: str, proto: Any, p: Preprocessing, images: Images, path: Path) -> Any:
    if precision == "fp16":
        import_onnxruntime()
        from onnxruntime.transformers.float16 import convert_float_to_float16

        return convert_float_to_float16(proto, keep_io_types=True)
    return _onnx_int8(proto, p, images, path) if precision == "int8" else proto


def _onnx_int8(proto: Any, p: Preprocessing, images: Images, path: Path) -> Any:
    import onnx

    import_onnxruntime()
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = _batches(images.calibration, p)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    source, target = path.with_suffix(".fp32.onnx"), path.with_suffix(".int8.onnx")
    onnx.save(proto, source)
    quantize_static(
        source,
        target,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv"],
        nodes_to_quantize=_pointwise(proto),
        # 7 bits: without VNNI (AVX2) the runtime adds two products in 16 bits, which 8-bit weights overflow silently
        reduce_range=True,
    )
    return onnx.load(target)


def _pointwise(proto: Any) -> list[str] | None:
    """Return the names of the 1x1 convolutions where there are depthwise ones, None (all) elsewhere.

    They are nearly all of the products and the weights. A depthwise kernel and the stem mix few values, so that their
    rounding does not average out: quantised too, they cost a ConvMixer several times the accuracy (docs/log.md).
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    kernels = {node.name: shapes[node.input[1]] for node in proto.graph.node if node.op_type == "Conv"}
    depthwise = any(shape[1] == 1 < shape[0] and shape[2] > 1 for shape in kernels.values())
    return [name for name, shape in kernels.items() if shape[2:] == (1, 1)] if depthwise else None


def _write_openvino(
    model: nn.Module,
    p: Preprocessing,
    images: Images,
    precision: str,
    texts: dict[str, str],
    path: Path,
    samples: Sequence[bytes] = (),
) -> None:
    openvino = import_openvino()
    source = path.with_suffix(".onnx")
    _write_onnx(model, p, images, "fp32", texts, source)
    converted = openvino.convert_model(source)
    if precision == "int8":
        import nncf

        batches = list(_batches(images.calibration, p))
        converted = nncf.quantize(
            converted,
            nncf.Dataset(batches),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(batches),
            ignored_scope=nncf.IgnoredScope(names=_not_pointwise(converted)),
        )
    for name, text in texts.items():
        converted.set_rt_info(text, ["convmixer", name])
    openvino.save_model(converted, path, compress_to_fp16=precision == "fp16")
    source.unlink()


def _not_pointwise(model: Any) -> list[str]:
    """Return the names of an OpenVINO model's products that `_pointwise` leaves out."""
    names, depthwise = [], False
    for op in model.get_ops():
        kind = op.get_type_name()
        depthwise |= kind == "GroupConvolution"
        wide = kind == "Convolution" and list(op.input(1).get_shape())[2:] != [1, 1]
        if wide or kind in ("GroupConvolution", "MatMul"):
            names.append(op.get_friendly_name())
    return names if depthwise else []


def _write_torch(
    model: nn.Module,
    p: Preprocessing,
    images: Images,
    precision: str,
    texts: dict[str, str],
    path: Path,
    samples: Sequence[bytes] = (),
) -> None:
    with torch.no_grad():
        program = torch.export.export(
            _traced(model), (_example(p),), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
        )
    torch.export.save(program, path, extra_files={"convmixer.json": json.dumps(texts)})


def _write_web(
    model: nn.Module,
    p: Preprocessing,
    images: Images,
    precision: str,
    texts: dict[str, str],
    path: Path,
    samples: Sequence[bytes] = (),
) -> None:
    """Write the page, the runtime and the model as files that a static server or the disk itself can give.

    Binary parts are base64 text in scripts: a page opened from disk may run scripts but not read other files.
    """
    path.mkdir()
    onnx_file = path / "model.onnx"
    _write_onnx(model, p, images, precision, texts, onnx_file)
    facts = {name: json.loads(text) for name, text in texts.items()}
    facts["samples"] = [data_uri(sample) for sample in samples]
    facts["onnx"] = base64.b64encode(onnx_file.read_bytes()).decode()
    onnx_file.unlink()
    (path / "model.js").write_text(f"globalThis.CONVMIXER_MODEL = {json.dumps(facts)};\n", encoding="utf-8")
    (path / "runtime.js").write_text(f'globalThis.CONVMIXER_RUNTIME = "{_runtime()}";\n', encoding="utf-8")
    for name in ("page.css", "page.js", "imaging.js", "local.js"):
        shutil.copyfile(_PAGE / name, path / name)
    for name in ("ort.js", "LICENSE", "ThirdPartyNotices.txt"):
        shutil.copyfile(_PAGE / "vendor" / name, path / (name if name == "ort.js" else f"onnxruntime-{name}"))
    scripts = ("ort.js", "runtime.js", "model.js", "imaging.js", "local.js")
    page = (_PAGE / "page.html").read_text(encoding="utf-8").replace("<!-- policy -->", _POLICY)
    tags = "\n".join(f'<script defer src="{name}"></script>' for name in scripts)
    (path / "index.html").write_text(page.replace("<!-- scripts -->", tags), encoding="utf-8")


_PAGE = Path(__file__).parent / "serve"
# the browser itself holds the promise that nothing is uploaded: no connection may be made
_POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'self' "
    "'wasm-unsafe-eval'; style-src 'self'; img-src 'self' data: blob:; connect-src 'none'; base-uri 'none'; "
    "form-action 'none'\">"
)


def _runtime() -> str:
    """Return the WebAssembly file of ONNX Runtime, gzipped, as base64."""
    wasm = lzma.decompress((_PAGE / "vendor" / "ort.wasm.xz").read_bytes())
    return base64.b64encode(gzip.compress(wasm, mtime=0)).decode()


_Writer = Callable[[nn.Module, Preprocessing, Images, str, dict[str, str], Path, Sequence[bytes]], None]
_WRITERS: dict[str, _Writer] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "torch": _write_torch,
    "web": _write_web,
}


class _Logits(nn.Module):
    """Gives every model's input the same name and its output the same form: images -> (logits,)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model(images),)


def _traced(model: nn.Module) -> nn.Module:
    return (WithMaps(model) if has_maps(model) else _Logits(model)).eval()


def _example(p: Preprocessing) -> torch.Tensor:
    return torch.zeros(2, p.in_chans, p.img_size, p.img_size)  # a batch of 1 would be taken as fixed


def _batches(images: Sequence[Image.Image], p: Preprocessing, sizes: Sequence[int] = (32,)) -> Iterator[np.ndarray]:
    """Yield (B, C, H, W) float32 for all images; B follows `sizes`, of which the last repeats."""
    start, steps = 0, list(sizes)
    while start < len(images):
        size = steps.pop(0) if len(steps) > 1 else steps[0]
        yield np.stack([preprocess(image, p) for image in images[start : start + size]])
        start += size


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _check_target(path: Path, format: str) -> None:
    """Refuse to write over anything but an export of the same form.

    Raises:
        RequestError: Something else lies there.
    """
    if format == "web":
        taken = path.is_symlink() or (path.exists() and not path.is_dir())
        if taken or (path.is_dir() and any(path.iterdir()) and not (path / "model.js").is_file()):
            raise RequestError(f"{path} exists and is no exported page: choose another --out")
    elif path.is_dir():
        raise RequestError(f"{path} is a folder: name a file that ends in {SUFFIX[format]}")


def _publish(draft: Path, path: Path) -> None:
    """Move what was written into place: a folder, or a file with the OpenVINO weights beside it."""
    if draft.is_dir():
        old = draft.with_name(f"{draft.name}.old")
        if path.exists():
            path.rename(old)
        draft.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        return
    weights = draft.with_suffix(".bin")
    if draft.suffix == ".xml":
        weights.replace(path.with_suffix(".bin"))
    draft.replace(path)


def _size(path: Path) -> int:
    files = (
        path.rglob("*") if path.is_dir() else (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)
    )
    return sum(file.stat().st_size for file in files if file.is_file())


class _quiet(warnings.catch_warnings):
    """Keeps the exporters' progress lines and warnings off the terminal."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)

    def __exit__(self, *args: Any) -> None:
        logging.disable(logging.NOTSET)
        super().__exit__(*args)
