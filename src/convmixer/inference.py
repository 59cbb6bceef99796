"""Loads a classifier once and classifies many images with it. torch is imported only for torch weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from convmixer.errors import RequestError
from convmixer.exported.load import is_exported, load_exported
from convmixer.preprocess import Preprocessing, preprocess

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
        describe: Facts about the model: "source", "name", "precision", "device", and the metadata saved with the
            weights.
        with_maps: A batch -> logits and class-activation maps, see `models.maps.WithMaps`. None if the
            model has no exact maps; for such an exported file, a function that returns None for the maps.
        loaded: The torch model, possibly on the kernels; None for an exported file.
    """

    logits: Logits
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    describe: dict[str, Any]
    with_maps: LogitsAndMaps | None = None
    loaded: "LoadedModel | None" = None

    def mirrored(self) -> "Classifier":
        """Return a classifier that averages the probabilities of an image and its mirror image; it takes twice the
        time.

        Its logits are the logarithms of these averages. It has no class-activation maps.
        """
        return replace(self, logits=_Mirrored(self.logits), with_maps=None)

    def explained(self, batch: np.ndarray, maps: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        """Return logits (B, classes), and maps (B, k, h, w) of the k likeliest classes, or None.

        The maps are None if `maps` is False or the model has none.
        """
        return self.with_maps(batch) if maps and self.with_maps else (self.logits(batch), None)

    def predict(self, images: Sequence[Image.Image], topk: int = 5) -> list[list[tuple[str, float]]]:
        """Return for each image the likeliest classes with their probabilities, in descending order.

        Args:
            images: Decoded images of any mode and size; all are computed in one batch.
            topk: Classes per image; if there are fewer classes, all of them.
        """
        if not images:
            return []
        return self.top(np.stack([preprocess(image, self.preprocessing) for image in images]), topk)

    def top(self, batch: np.ndarray, topk: int) -> list[list[tuple[str, float]]]:
        """Return the same as `predict` for a preprocessed batch (B, C, H, W)."""
        probabilities = softmax(self.logits(batch))
        return [
            [(self.classes[i], float(row[i])) for i in best]
            for row, best in zip(probabilities, ranked(probabilities, topk), strict=True)
        ]


def finite(logits: np.ndarray) -> np.ndarray:
    """Check that all logits are finite, and return them; every function that uses a model's outputs calls this first.

    Raises:
        RequestError: A logit is NaN or infinite.
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
        source: Weights, see `models.weights.load_model`; or a file or folder that `convmixer export` wrote.
        precision: "auto" (bf16 if the device computes it natively), "fp32", "tf32", "bf16", or "int8" on the CPU.
        device: "auto", "cpu", "cuda" or "mps"; exported files run on the device of their runtime.
        calibration: Only for int8: the loaded model -> typical preprocessed images (B, C, H, W).
        expected: Overrides of the input settings stored with the weights, see `models.weights.load_model`: "act" and
            fields of `Preprocessing` (not `in_chans`).

    Raises:
        RequestError: The source cannot be loaded, or not with this precision.
    """
    if is_exported(source):
        if expected:
            flags = ", ".join("--" + name.replace("_", "-") for name in expected)
            raise RequestError(
                f"{source} stores its own preprocessing: leave out {flags}, or export the weights with them"
            )
        return _from_exported(Path(source), precision)
    from convmixer.device import choose_device, choose_precision
    from convmixer.fast.support import DTYPES, why_not
    from convmixer.models.weights import load_model

    where = choose_device(device)
    how = precision if precision == "int8" else choose_precision(precision, where)
    if how == "int8" and (reason := why_not(where, DTYPES[how])):
        raise RequestError(
            f"int8 needs the CPU kernels: {reason}; an int8 export does not: `export --precision int8`"
        )
    if how == "int8" and calibration is None:
        raise RequestError(
            "int8 needs images to calibrate on: `val --precision int8` takes training images, and a file of "
            "`export --precision int8` holds the result"
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
    """Return a function that runs a model on the device's kernels if they can be used, else in plain PyTorch.

    The model is moved to the device and accelerated in place.
    """
    from convmixer.fast import accelerate, has_kernels, optimize_for_inference

    model.to(device)
    if has_kernels(device, precision):
        return torch_logits(optimize_for_inference(accelerate(model), precision, calibration).eval(), device, "fp32")
    return torch_logits(model, device, precision)


def torch_logits(model: "nn.Module", device: "torch.device", precision: str) -> Logits:
    """Return a function that runs a model in eval mode on arrays.

    Args:
        model: The model; it is moved to the device, and keeps its mode.
        device: The device to compute on.
        precision: "fp32", "tf32", "bf16" or "fp16"; see `device.choose_precision`.
    """
    return _LogitsOf(_TorchRun(model, device, precision))


def torch_maps(model: "nn.Module", device: "torch.device", precision: str) -> LogitsAndMaps | None:
    """Return a function like that of `torch_logits` that also returns class-activation maps.

    Return None if the model has no exact maps.
    """
    from convmixer.models.maps import WithMaps, has_maps

    if not has_maps(model):
        return None
    return _TorchRun(WithMaps(model).eval(), device, precision)


@dataclass(frozen=True)
class _Mirrored:
    """Computes logits whose softmax is the mean over an image and its mirror image; picklable like `_LogitsOf`."""

    logits: Logits

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        both = [softmax(self.logits(np.ascontiguousarray(images))) for images in (batch, batch[..., ::-1])]
        mean: np.ndarray = np.log(np.maximum((both[0] + both[1]) / 2, np.finfo(np.float64).tiny)).astype(np.float32)
        return mean


@dataclass(frozen=True)
class _LogitsOf:
    """Returns only the logits of a function that returns several outputs. It is a class and not a closure, because a
    fitted estimator must be picklable.
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
