"""Load once, predict many: images in, class names and probabilities out. Torch is imported only for torch weights."""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from convmixer.data.unused import NO_IMAGE, Unused
from convmixer.data.walk import is_image, walk
from convmixer.errors import RequestError
from convmixer.exported.load import is_exported, load_exported
from convmixer.files import write_atomic
from convmixer.preprocess import SUFFIXES, Preprocessing, load_image, preprocess
from convmixer.progress import track
from convmixer.text import csv_cell, markup

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

    from convmixer.models.weights import LoadedModel

Logits = Callable[[np.ndarray], np.ndarray]
LogitsAndMaps = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class Classifier:
    """A model ready to classify, in torch or in an exported file.

    Args:
        logits: (B, C, H, W) float32 -> (B, classes) float32.
        classes: Class names in the order of the logits.
        preprocessing: How an image becomes the input.
        describe: What it is: "source", "name", "precision", "device", and the metadata saved with the weights.
        with_maps: The same batch -> logits and class-activation maps, see `models.maps.WithMaps`; None if the
            model has no exact ones.
        loaded: The torch model behind it, possibly accelerated by the kernels; None for an exported file.
    """

    logits: Logits
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    describe: dict[str, Any]
    with_maps: LogitsAndMaps | None = None
    loaded: "LoadedModel | None" = None

    def explained(self, batch: np.ndarray, maps: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        """Return logits (B, classes) and, if wanted and the model has any, maps (B, k, h, w) of the k top classes."""
        return self.with_maps(batch) if maps and self.with_maps else (self.logits(batch), None)

    def predict(self, images: Sequence[Image.Image], topk: int = 5) -> list[list[tuple[str, float]]]:
        """Return for each image the likeliest classes with their probabilities, in descending order.

        Args:
            images: Decoded images of any mode and size; all go through in one batch.
            topk: Classes per image; at most all.
        """
        if not images:
            return []
        return self.top(np.stack([preprocess(image, self.preprocessing) for image in images]), topk)

    def top(self, batch: np.ndarray, topk: int) -> list[list[tuple[str, float]]]:
        """Return what `predict` returns, for a batch that is already preprocessed, (B, C, H, W)."""
        probabilities = softmax(self.logits(batch))
        return [
            [(self.classes[i], float(row[i])) for i in best]
            for row, best in zip(probabilities, ranked(probabilities, topk), strict=True)
        ]


def finite(logits: np.ndarray) -> np.ndarray:
    """Return the logits if all are finite; every function that uses a model's outputs calls this first.

    Raises:
        RequestError: One is NaN or infinite.
    """
    if not np.isfinite(logits).all():
        raise RequestError(
            "the model's outputs are NaN or infinite: its weights are damaged, or its training diverged; "
            "use other weights"
        )
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities, float64 (B, classes).

    Raises:
        RequestError: A logit is NaN or infinite.
    """
    logits = finite(logits).astype(np.float64)
    values: np.ndarray = np.exp(logits - logits.max(axis=1, keepdims=True))
    return values / values.sum(axis=1, keepdims=True)


def ranked(values: np.ndarray, topk: int) -> np.ndarray:
    """Return the indices of the largest values along the last axis, in descending order; ties keep their order."""
    order: np.ndarray = np.argsort(-values, axis=-1, kind="stable")[..., :topk]
    return order


def load_classifier(
    source: str | Path,
    precision: str = "auto",
    device: str = "auto",
    calibration: "Callable[[LoadedModel], torch.Tensor] | None" = None,
    expected: dict[str, Any] | None = None,
) -> Classifier:
    """Return a classifier from weights or an exported file.

    Args:
        source: Whatever `models.weights.load_model` takes, or what `convmixer export` wrote.
        precision: "auto" (bf16 if the device computes it natively), "fp32", "tf32", "bf16", or "int8" on the CPU.
        device: "auto", "cpu", "cuda" or "mps"; exported files run on the device of their runtime.
        calibration: For int8, gives typical images (B, C, H, W) preprocessed for the model.
        expected: Overrides of the input settings stored with the weights, see `models.weights.load_model`: "act" and
            fields of `Preprocessing`.

    Raises:
        RequestError: It cannot be loaded, or not with this precision.
    """
    if is_exported(source):
        if expected:
            flags = ", ".join("--" + name.replace("_", "-") for name in expected)
            raise RequestError(
                f"{source} stores its own preprocessing: leave out {flags}, or export the weights with them"
            )
        return _from_exported(Path(source), precision)
    from convmixer.device import choose_device, choose_precision
    from convmixer.fast import has_kernels
    from convmixer.models.weights import load_model

    where = choose_device(device)
    how = precision if precision == "int8" else choose_precision(precision, where)
    if how == "int8" and (calibration is None or not has_kernels(where, how)):
        raise RequestError(
            "int8 is not available here: it needs training images to calibrate on, and a CPU with kernels. Measure "
            "it with `val --precision int8`, or use it through `export --precision int8`"
        )
    loaded = load_model(source, **(expected or {}))
    about = {"source": str(source), "found": loaded.found, "precision": how, "device": str(where)}
    maps = torch_maps(loaded.model, where, "fp32" if how == "int8" else how)
    logits = fastest(loaded.model, where, how, calibration and calibration(loaded))
    return Classifier(logits, loaded.classes, loaded.preprocessing, {**loaded.metadata, **about}, maps, loaded)


def _from_exported(path: Path, precision: str) -> Classifier:
    if precision != "auto":
        raise RequestError(f"{path} has the precision it was exported with: leave --precision out")
    exported = load_exported(path)
    logits = _LogitsOf(exported.run)
    return Classifier(logits, exported.classes, exported.preprocessing, exported.describe, exported.run)


def fastest(
    model: "nn.Module", device: "torch.device", precision: str, calibration: "torch.Tensor | None" = None
) -> Logits:
    """Return the function that runs a model on the device's kernels if they can be used, else on plain PyTorch.

    The model is moved to the device and accelerated in place, so other users of the same model are fast too.
    """
    from convmixer.fast import accelerate, has_kernels, optimize_for_inference

    model.to(device)
    if has_kernels(device, precision):
        return torch_logits(optimize_for_inference(accelerate(model), precision, calibration).eval(), device, "fp32")
    return torch_logits(model, device, precision)


def torch_logits(model: "nn.Module", device: "torch.device", precision: str) -> Logits:
    """Return a function that runs a model in eval mode on arrays.

    Args:
        model: Moved to the device, and left in the mode it was in.
        device: Where to compute.
        precision: "fp32", "tf32", "bf16" or "fp16"; see `device.choose_precision`.
    """
    return _LogitsOf(_TorchRun(model, device, precision))


def torch_maps(model: "nn.Module", device: "torch.device", precision: str) -> LogitsAndMaps | None:
    """Return a function like that of `torch_logits` that also gives class-activation maps; None if there are no exact
    ones.
    """
    from convmixer.models.maps import WithMaps, has_maps

    if not has_maps(model):
        return None
    return _TorchRun(WithMaps(model).eval(), device, precision)


@dataclass(frozen=True)
class _LogitsOf:
    """The first output of a run; a class and not a closure, because a fitted estimator that holds it must be
    picklable.
    """

    run: Callable[[np.ndarray], tuple[Any, ...]]

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        logits: np.ndarray = self.run(batch)[0]
        return logits


class _TorchRun:
    """Runs a model in eval mode on arrays: see `torch_logits` for the arguments."""

    def __init__(self, model: "nn.Module", device: "torch.device", precision: str) -> None:
        import torch

        self.model, self.device = model.to(device), device
        self.dtype = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def __call__(self, batch: np.ndarray) -> tuple[Any, ...]:
        import torch

        model, device, dtype = self.model, self.device, self.dtype
        modes = [(module, module.training) for module in model.modules()] if model.training else []
        model.eval()
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            out = model(torch.from_numpy(batch).to(device))
        for module, training in modes:  # a served model is in eval mode already, because other threads may run it
            module.training = training
        parts: Sequence[torch.Tensor] = out if isinstance(out, tuple) else (out,)
        return tuple(part.float().cpu().numpy() for part in parts)


def predict_files(
    weights: str | Path,
    images: Sequence[Path],
    topk: int = 5,
    batch_size: int = 32,
    precision: str = "auto",
    out: Path | None = None,
    expected: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Classify files and folders, print a table, and return one entry per file, in the order given.

    Args:
        weights: See `load_classifier`.
        images: Files, and folders whose image files are taken in sorted order, however deep.
        topk: Classes per image, at least 1.
        batch_size: Images at once, at least 1.
        precision: See `load_classifier`.
        out: A .csv or .jsonl file for the predictions, or None.
        expected: See `load_classifier`.

    Returns:
        "predictions": a list of {"file", "classes", "probabilities"}, or {"file", "error"} if it cannot be read.

    Raises:
        RequestError: Bad arguments, or no file to classify.
        RuntimeError: Not one of the files can be read.
    """
    if min(topk, batch_size) < 1:
        raise RequestError(f"--topk and --batch-size must be at least 1, not {topk} and {batch_size}")
    if out is not None and out.suffix not in _WRITERS:
        raise RequestError(f"--out {out} must end in {' or '.join(_WRITERS)}")
    files, unused = expand(images)
    if not files:
        raise RequestError("name at least one image or folder")
    classifier = load_classifier(weights, precision, expected=expected)
    predictions = list(_predict_each(classifier, files, topk, batch_size))
    if out is not None:
        # names of files are bytes to the system, and not always text
        write_atomic(out, _WRITERS[out.suffix](predictions).encode(errors="surrogateescape"))
    _print_table(predictions, classifier, out, unused)
    errors = [p["error"] for p in predictions if "error" in p]
    if len(errors) == len(predictions):
        raise RuntimeError(f"none of the {len(errors)} files can be read; the first: {errors[0]}")
    return {"predictions": predictions}


def expand(paths: Sequence[Path]) -> tuple[list[Path], Unused]:
    """Return files in the order given, each folder replaced by the image files below it in sorted order.

    Folders are read as `train` reads them, see `data.walk`; the second value counts what was passed over.

    Raises:
        RequestError: A folder holds no image files.
    """
    files: list[Path] = []
    unused = Unused()
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        walked = walk(path)
        below = sorted(path / file for file in walked.files if is_image(file))
        if not below:
            raise RequestError(f"{path} holds no image files ({', '.join(SUFFIXES)})")
        files += below
        unused.update(walked.unused)
        unused.add(NO_IMAGE, *(file for file in walked.files if not is_image(file)))
    return files, unused


def _predict_each(
    classifier: Classifier, files: Sequence[Path], topk: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Decode the next batch in threads while the model computes this one."""
    batches = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def start(batch: Sequence[Path]) -> list[Any]:
            return [pool.submit(_read, file, classifier.preprocessing) for file in batch]

        coming = start(batches[0])
        for number, batch in enumerate(track(batches, "predicting", len(batches))):
            arrays = [future.result() for future in coming]
            coming = start(batches[number + 1]) if number + 1 < len(batches) else []
            yield from _entries(classifier, batch, arrays, topk)


def _read(file: Path, p: Preprocessing) -> np.ndarray | str:
    """Return a file as input, or why it cannot be read."""
    try:
        return preprocess(load_image(file, p.in_chans, p.bits), p)
    except (OSError, ValueError) as error:
        return " ".join(str(error).removeprefix(f"{file}: ").split())


def _entries(
    classifier: Classifier, files: Sequence[Path], arrays: Sequence[np.ndarray | str], topk: int
) -> Iterator[dict[str, Any]]:
    good = [array for array in arrays if not isinstance(array, str)]
    tops = iter(classifier.top(np.stack(good), topk) if good else [])
    for file, array in zip(files, arrays, strict=True):
        if isinstance(array, str):
            yield {"file": str(file), "error": array}
        else:
            names, probabilities = zip(*next(tops), strict=True)
            yield {"file": str(file), "classes": list(names), "probabilities": list(probabilities)}


def _csv(predictions: Sequence[dict[str, Any]]) -> str:
    most = max(len(p.get("classes", ())) for p in predictions)
    pairs = [f"{name}_{i + 1}" for i in range(most) for name in ("class", "probability")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", *pairs, "error"])
    for p in predictions:
        cells = [v for pair in zip(p.get("classes", ()), p.get("probabilities", ()), strict=True) for v in pair]
        row = [p["file"], *(cells or [""] * len(pairs)), p.get("error", "")]
        writer.writerow([csv_cell(value) if isinstance(value, str) else value for value in row])
    return text.getvalue()


def _jsonl(predictions: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions)


_WRITERS: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {".csv": _csv, ".jsonl": _jsonl}


def _print_table(
    predictions: Sequence[dict[str, Any]], classifier: Classifier, out: Path | None, unused: Unused
) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(width=None if sys.stdout.isatty() else 200)
    about = classifier.describe
    console.print(
        f"{markup(about.get('found') or about['source'])} ({about.get('precision', 'exported')})", highlight=False
    )
    table = Table(Column("file", overflow="fold"), "prediction", box=None, pad_edge=False)
    shown = predictions[:50]
    for p in shown:
        pairs = zip(p.get("classes", ()), p.get("probabilities", ()), strict=True)
        text = ", ".join(f"{markup(name)} {100 * value:.1f}%" for name, value in pairs)
        table.add_row(markup(p["file"]), text or f"[red]{markup(p['error'])}[/red]")
    console.print(table)
    bad = sum("error" in p for p in predictions)
    rest = len(predictions) - len(shown)
    notes = [
        f"{rest} more not shown" if rest else "",
        f"{bad} of {len(predictions)} files cannot be read" if bad else "",
        *unused.notes(),
        f"written to {markup(out)}" if out else "",
    ]
    for note in filter(None, notes):
        console.print(note, highlight=False)
