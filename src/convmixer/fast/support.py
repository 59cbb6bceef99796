"""The one question whether kernels may serve: a device and a type, a model, a single pass."""

import functools
import sys
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from convmixer import kernels
from convmixer.models.isotropic import Isotropic
from convmixer.models.layers import DepthwiseConv2d, Residual

ACTS: dict[type[nn.Module], int] = {nn.GELU: 0, nn.ReLU: 1}  # as the kernels number them
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
QUIETLY = "another tool needs the plain model"  # nothing that the user should change


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why no kernels compute on a device in a type, or None. Builds the CPU's on first use.

    Args:
        device: Where the model is.
        dtype: float32 or bfloat16; on a GPU also float16; on a CPU also int8, for inference.
    """
    if device.type == "cuda":
        return kernels.cuda.why_not(device, dtype)
    if device.type != "cpu":
        return f"there are none for {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.int8):
        return f"on a CPU they compute in fp32 and bf16, not in {dtype}"
    return kernels.why_not()


def has_kernels(device: torch.device, precision: str) -> bool:
    """Return whether kernels compute on a device in a precision of `DTYPES`; int8 is for inference."""
    return why_not(device, DTYPES[precision]) is None


@functools.cache
def say_once(reason: str) -> None:
    """Print once in a process why plain PyTorch runs; `QUIETLY` is not said."""
    if reason != QUIETLY:
        print(f"convmixer: plain PyTorch instead of the kernels: {reason}", file=sys.stderr, flush=True)


def unfit(model: Any, x: Tensor) -> str | None:
    """Return why the kernels cannot run this pass, or None."""
    weight = model.stem[0].weight
    if x.device != weight.device:
        return f"the model is on {weight.device}, the images on {x.device}"
    for dtype in (dtype_of(model), weight.dtype):
        if not torch.compiler.is_compiling() and (reason := why_not(weight.device, dtype)):
            return reason
    if model.grad_checkpointing:
        return "gradient checkpointing is on"
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return QUIETLY
    if torch.compiler.is_compiling() and not all_depthwise(model.blocks):
        return QUIETLY  # the ops around another mixer have no fake kernels
    return unusual(model)


def unusual(model: Any) -> str | None:
    """Return what in the model the kernels do not know, or None."""
    act = type(model.stem[1])
    expected: list[tuple[nn.Module, type[nn.Module]]] = [(model.stem[0], nn.Conv2d), (model.stem, nn.Sequential)]
    for norm_parts in act_norms(model):
        if len(norm_parts) != 2:
            return "its blocks are built in another way"
        expected += zip(norm_parts, (act, nn.BatchNorm2d), strict=True)
    for block in model.blocks:
        residual, pointwise = block[0], block[1]
        inner: Any = getattr(residual, "fn", [None])
        expected += [(block, nn.Sequential), (residual, Residual), (pointwise, nn.Conv2d)]
        expected += [(inner, nn.Sequential)]
        if not isinstance(model, Isotropic) or type(inner[0]) is DepthwiseConv2d:  # its other mixers are called
            expected += [(inner[0], DepthwiseConv2d)]
    for module, kind in expected:
        if type(module) is not kind:
            return f"the model has a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return QUIETLY
    if act not in ACTS or (act is nn.GELU and model.stem[1].approximate != "none"):
        return f"the activation is {model.stem[1]}"
    norms = norms_of(model)
    for norm in norms:
        if norm.weight is None or norm.running_mean is None or norm.momentum is None:
            return "a BatchNorm has no weight, no running statistics or no momentum"
        if (norm.eps, norm.training) != (norms[0].eps, norms[0].training):
            return "the BatchNorms differ in eps or mode"
    return None


def plain_blocks(model: Any) -> int:
    """Return how many blocks run as torch modules: the first, where the stem pools between its norm and that block.

    What the kernels start from is a convolution's output with activation and norm still to come.
    """
    return int(type(model.stem[-1]) is nn.AvgPool2d)


def act_norms(model: Any) -> list[list[Any]]:
    """Return the activations and norms that the kernels compute, in their order."""
    plain = plain_blocks(model)
    pairs = [list(model.stem)[-2 - plain :][:2]]
    for block in model.blocks:
        pairs += [list(getattr(block[0], "fn", block[0]))[1:], list(block)[2:]]
    return [pairs[0], *pairs[1 + plain :]]


def norms_of(model: Any) -> list[Any]:
    return [pair[1] for pair in act_norms(model)]


def dtype_of(model: Any) -> torch.dtype:
    weight = next(model.parameters())
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def all_depthwise(blocks: Any) -> bool:
    """Return whether every block mixes places by a depthwise convolution, so that the kernels compute all of it."""
    return all(type(getattr(block[0], "fn", block[0])[0]) is DepthwiseConv2d for block in blocks)
