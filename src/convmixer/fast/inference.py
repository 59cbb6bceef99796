"""Makes inference of a trained ConvMixer fast: on a CPU, the whole network is one kernel, in fp32, bf16 or int8.

Activation, BatchNorm (as a scale and a shift) and the residual sum are computed at the end of the depthwise
convolution and of the matrix multiplication, so no tensor is written to memory and read again for them. For GPUs see
`fast.cuda`, for training `fast.accelerate`.
"""

import sys
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from convmixer import kernels
from convmixer.errors import RequestError
from convmixer.fast.structure import ACTS, QUIETLY, found, is_patches
from convmixer.fast.support import DTYPES, check_images, differentiating, say_once, tools_at_work, why_not
from convmixer.fast.training import FastConvMixer
from convmixer.kernels.cpu.build import largest_int8_weight, level
from convmixer.kernels.cpu.network import PRECISIONS, VECTORS, pack, run
from convmixer.models.convmixer import ConvMixer

LARGEST_KERNEL = 15


def optimize_for_inference(
    model: nn.Module, precision: str = "fp32", calibration: Tensor | Iterable[Tensor] | None = None
) -> nn.Module:
    """Return a module that computes a trained model's logits, on the kernels if they can be used.

    fp32 and bf16 are exact up to rounding. int8 rounds the weights of the matrix multiplications, with a scale for
    each output channel, and their inputs, with a scale for each input channel. This reduces accuracy: measure it with
    `convmixer val --precision int8`.

    The weights are copied, so train first, then optimise. If the kernels cannot be used, or the model is not a plain
    ConvMixer, the model itself runs, in eval mode and in the given precision; for a ConvMixer the reason is printed
    once. On a GPU there is one CUDA graph per batch shape.

    Args:
        model: The model. It is put into eval mode, and not changed otherwise.
        precision: "fp32", "bf16", on a GPU also "tf32" and "fp16", on a CPU also "int8". With "bf16", sums are fp32;
            a processor without bf16 instructions computes in fp32 instead.
        calibration: Only for int8: typical preprocessed images, (B, C, H, W) or several such batches; 64 images are
            enough.

    Returns:
        A module (B, in_chans, H, W) -> (B, num_classes), fp32, without gradients; autocast does not change it.

    Raises:
        RequestError: The precision is not known, or for int8 there are no calibration images or no kernels.
    """
    known = DTYPES if next(model.parameters()).is_cuda else PRECISIONS
    if precision not in known:
        raise RequestError(f"precision must be one of {', '.join(known)}, not {precision!r}")
    reason = _unfit(model, precision)
    if reason is None and isinstance(model, ConvMixer) and next(model.parameters()).is_cuda:
        from convmixer.fast.cuda import CudaInference  # Triton comes only with CUDA builds of PyTorch

        return CudaInference(model, DTYPES[precision])
    if reason is None:
        if calibration is not None and not isinstance(calibration, Tensor):
            calibration = list(calibration)
        optimized = _optimized(model, precision, calibration)
        if precision == "int8" and calibration is not None:
            images = calibration if isinstance(calibration, Tensor) else calibration[0]
            _say_if_slower(optimized, _optimized(model, "fp32", None), images)
        return optimized
    if precision == "int8":
        raise RequestError(f"int8 needs the CPU kernels: {reason}")
    if type(model) in (ConvMixer, FastConvMixer):
        say_once(reason)
    return PlainInference(model, precision)


def _say_if_slower(int8: nn.Module, fp32: nn.Module, images: Tensor) -> None:
    """Print a line if int8 is not faster than fp32 on this machine: the fastest of three passes of one image each."""
    one = images[:1]
    seconds = [min(_seconds(run, one) for _ in range(3)) for run in (int8, fp32)]
    if seconds[0] >= seconds[1]:
        ratio = seconds[1] / seconds[0]
        print(f"convmixer: int8 is not faster than fp32 here, {ratio:.2f} of its speed: {level()}", file=sys.stderr)


def _seconds(run: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    run(images)
    return time.perf_counter() - start


class PlainInference(nn.Module):
    """A model in eval mode, without gradients, in a precision of `DTYPES`."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.model, self.precision = model.eval(), precision

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        half = self.precision in ("bf16", "fp16")
        with torch.inference_mode(), torch.autocast(x.device.type, DTYPES[self.precision], enabled=half):
            logits: Tensor = self.model(x).float()
        return logits


class FastInference(nn.Module):
    """A ConvMixer as one op. `optimize_for_inference` makes it; it has no parameters and no state dict."""

    weights: Tensor
    head_weight: Tensor
    head_bias: Tensor

    def __init__(self, model: ConvMixer, weights: Tensor, precision: str) -> None:
        super().__init__()
        parts: Any = model
        stem, dim = parts.stem[0], parts.stem[0].out_channels
        self.sizes = (dim, len(parts.blocks), parts.blocks[0][0].fn[0].kernel_size[0], stem.kernel_size[0])
        self.in_chans, self.act, self.precision = stem.in_channels, ACTS[type(parts.stem[1])], precision
        weight, bias = getattr(model.head, "weight", torch.eye(dim)), getattr(model.head, "bias", None)
        self.num_classes = len(weight) if isinstance(model.head, nn.Linear) else 0
        head = [p.detach().float().clone() for p in (weight, torch.zeros(1) if bias is None else bias)]
        for name, value in zip(("weights", "head_weight", "head_bias"), (weights, *head), strict=True):
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        check_images(x, self.in_chans)
        if isinstance(x, Tensor) and not torch.compiler.is_compiling() and differentiating():
            raise RuntimeError("an optimised model has no derivatives: differentiate the model itself")
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            pooled = run(x.float(), self.weights, *self.sizes, self.act, self.precision)
            logits = F.linear(pooled, self.head_weight.float(), self.head_bias.float())  # fp32 also after .half()
            if self.precision == "int8":  # integers have neither NaN nor Inf
                logits = torch.where(x.flatten(1).isfinite().all(1)[:, None], logits, float("nan"))
            return logits

    def __setstate__(self, state: dict[str, Any]) -> None:  # called for a copy, or in the process that unpickles it
        super().__setstate__(state)
        if reason := kernels.why_not():
            raise RequestError(f"a model optimised for inference needs the CPU kernels: {reason}")


def _unfit(model: Any, precision: str) -> str | None:
    """Return why the kernel cannot run this model, or None."""
    if type(model) not in (ConvMixer, FastConvMixer):  # a subclass may have another stem
        return f"the model is a {type(model).__name__}"
    if tools_at_work():
        return QUIETLY
    about = found(model.eval())
    if about.reason:
        return about.reason
    return why_not(about.weights[0].device, DTYPES[precision]) or _stem_or_kernel(model) or _head(model)


def _stem_or_kernel(model: Any) -> str | None:
    kernels_of = {block[0].fn[0].kernel_size for block in model.blocks}
    if len(kernels_of) != 1 or max(max(kernels_of)) > LARGEST_KERNEL:
        return f"kernels must be of one size up to {LARGEST_KERNEL}"
    conv, dim = model.stem[0], model.stem[2].num_features
    if len(model.stem) != 3 or not is_patches(conv) or conv.bias is None or conv.weight.shape[0] != dim:
        return "the stem is not a patch embedding"
    return None if model.blocks[0][3].num_features == dim else "its widths differ"


def _head(model: Any) -> str | None:
    """Return what the kernels do not support in the pooling, the dropout or the classifier, or None."""
    if model.global_pool != "avg":
        return f"it pools by {model.global_pool or 'nothing'}, not by the mean"
    for module, kinds in ((model.head, (nn.Linear, nn.Identity)), (model.head_drop, (nn.Dropout, nn.Identity))):
        if type(module) not in kinds or "forward" in module.__dict__:
            return f"the classifier is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks:
            return QUIETLY
    if any(p.dtype is not model.stem[0].weight.dtype for p in model.head.parameters()):
        return "the classifier differs in type"
    return None


@torch.no_grad()
def _optimized(model: Any, precision: str, calibration: Tensor | Iterable[Tensor] | None) -> FastInference:
    blocks = list(model.blocks)
    point = torch.stack([block[1].weight[:, :, 0, 0].float() for block in blocks])
    spatial_vectors = torch.stack([_vectors(block[0].fn[0], block[0].fn[2]) for block in blocks])
    point_vectors = torch.stack([_vectors(block[1], block[3]) for block in blocks])
    if precision == "int8":
        low, high, mean = _input_ranges(model, calibration)
        steps = 255 / (high - low).clamp_min(1e-6)
        exact, (point, scales) = point, _quantized(point / steps[:, None])
        rounded_off = exact - point * scales[:, :, None] * steps[:, None]
        bias = rounded_off @ mean[:, :, None] + (point * scales[:, :, None]) @ (low * steps)[:, :, None]
        spatial_vectors[:, VECTORS.index("steps")], spatial_vectors[:, VECTORS.index("zero")] = steps, -low * steps
        point_vectors[:, VECTORS.index("multiply")] = scales
        point_vectors[:, VECTORS.index("bias")] += bias[:, :, 0]  # undoes the zero points and rounding's mean error
    spatial = torch.stack([block[0].fn[0].weight[:, 0] for block in blocks])
    stem = (model.stem[0].weight, _vectors(model.stem[0], model.stem[2]))
    packed = pack(*stem, spatial, spatial_vectors, point, point_vectors, precision)
    return FastInference(model, packed, precision)


def _vectors(conv: Any, norm: Any) -> Tensor:
    """Return the rows of `VECTORS`, (6, dim), for a convolution and the BatchNorm after its activation."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    one = torch.ones_like(scale)
    return torch.stack((one, conv.bias.double(), scale, shift, one, 0 * one)).float()


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights (depth, dim, dim) as whole numbers up to `largest_int8_weight`, and the scales, (depth, dim)."""
    scales = (weight.abs().amax(2) / largest_int8_weight()).clamp_min(1e-12)
    return (weight / scales[:, :, None]).round(), scales


def _input_ranges(model: Any, calibration: Tensor | Iterable[Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the smallest, largest and mean input of each channel of the matrix products, each (depth, dim)."""
    if calibration is None:
        raise RequestError("int8 needs images for calibration: give some, or choose another precision")
    batches = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    if not batches:
        raise RequestError("int8 needs images for calibration: give at least one batch")
    low = torch.full((len(model.blocks), model.stem[0].out_channels), float("inf"))
    high, total = -low, torch.zeros_like(low)

    def watch(i: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            low[i] = torch.minimum(low[i], inputs[0].amin((0, 2, 3)))
            high[i] = torch.maximum(high[i], inputs[0].amax((0, 2, 3)))
            total[i] += inputs[0].mean((0, 2, 3))

        return hook

    hooks = [block[1].register_forward_pre_hook(watch(i)) for i, block in enumerate(model.blocks)]
    try:
        for images in batches:
            model(images.float())
    finally:
        for hook in hooks:
            hook.remove()
    return low, high, total / len(batches)
