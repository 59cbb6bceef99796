"""Says whether the kernels can be used: for a device and dtype, for a model, for one forward pass."""

import functools
import sys
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext

from convmixer import kernels
from convmixer.device import native_bf16
from convmixer.fast.structure import QUIETLY, all_depthwise, forwards_replaced, found, frozen_blocks, unusual

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
_NATIVE_BF16 = native_bf16()
_CAST = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that autocast converts


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot run on a device with a dtype, or None if they can.

    The CPU kernels are built on first use.

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


def emulates_bf16(device: torch.device) -> bool:
    """Return whether torch emulates bf16 matrix multiplications on a device, a hundred times slower than fp32."""
    return device.type == "cpu" and not _NATIVE_BF16


def has_kernels(device: torch.device, precision: str) -> bool:
    """Return whether the kernels support a precision of `DTYPES` on a device; int8 is for inference only."""
    return why_not(device, DTYPES[precision]) is None


@functools.cache
def say_once(reason: str) -> None:
    """Print why plain PyTorch runs, once per process and reason; the reason `QUIETLY` is not printed."""
    if reason != QUIETLY:
        print(f"convmixer: plain PyTorch instead of the kernels: {reason}", file=sys.stderr, flush=True)


def unfit(model: Any, x: Tensor) -> str | None:
    """Return why the kernels must not run this forward pass, or None.

    They run only if plain PyTorch would give the same result: no other tool may change or watch the modules, the
    kernels must know everything in the model, and the model's first convolution must accept the images.
    """
    if type(x) not in (Tensor, nn.Parameter) or torch.compiler.is_exporting():
        return QUIETLY  # fx passes proxies, and other tools pass tensor subclasses
    if torch.compiler.is_compiling():  # without `found`: torch.compile would guard on each value that it reads
        usual = all_depthwise(model.blocks) and not forwards_replaced() and frozen_blocks(model) is None
        known = unusual(model) or (None if usual else QUIETLY)
        return known or _settings(model, model.stem[0].weight, x, model.stem[0].in_channels)
    if tools_at_work():
        return QUIETLY
    about = found(model)
    if about.reason:
        return about.reason
    if about.frozen and torch.is_grad_enabled() and any(t.requires_grad for t in (x, *about.frozen)):
        return "the first BatchNorms are in eval mode, but their layers are trained"
    weight = about.weights[0]
    reason = why_not(weight.device, weight.dtype) or _settings(model, weight, x, about.in_chans)
    if reason or (dtype := _computed_in(weight)) is weight.dtype:  # asked last: it raises for a meta device
        return reason
    return why_not(weight.device, dtype)


def _settings(model: Any, weight: Tensor, x: Tensor, in_chans: int) -> str | None:
    """Return what is wrong with the images of a pass, or with the way the model is run."""
    if x.device != weight.device:
        return f"the model is on {weight.device}, the images on {x.device}"
    if model.grad_checkpointing:
        return "gradient checkpointing is on"
    if x.ndim != 4 or x.shape[1] != in_chans or x.layout is not torch.strided:
        return QUIETLY  # the plain model reports what is wrong
    if not x.shape[0]:
        return QUIETLY  # the kernels divide by the number of values
    autocast = torch.is_autocast_enabled(x.device.type)
    return None if x.dtype is weight.dtype or (autocast and x.dtype in _CAST) else QUIETLY


def check_images(images: Any, in_chans: int) -> None:
    """Check the argument with which an optimised model is called; fx's proxies are accepted.

    Raises:
        TypeError: It is not a tensor.
        ValueError: It is not (B, in_chans, H, W), or not of floating-point numbers.
    """
    wanted = f"images must be (B, {in_chans}, H, W), preprocessed"
    if not isinstance(images, Tensor):
        if not isinstance(images, torch.fx.Proxy):
            raise TypeError(f"{wanted}, not a {type(images).__name__}")
    elif images.ndim != 4 or images.shape[1] != in_chans or not images.is_floating_point():
        raise ValueError(f"{wanted}, not {tuple(images.shape)} {images.dtype}")


def tools_at_work() -> bool:
    """Return whether a tool must see each module run: a transform, a tracer, a mode, or a hook on all modules."""
    return bool(
        forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or _has_any_global_hook()
        or forwards_replaced()
        or (torch._C._len_torch_function_stack() and any(type(m) is not DeviceContext for m in _function_modes()))
    )


def differentiating() -> bool:
    """Return whether forward-mode AD or a derivative of `torch.func` is being computed."""
    if forward_ad._current_level >= 0:
        return True
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() != torch._C._functorch.TransformType.Vmap for level in stack)


def _function_modes() -> list[Any]:
    return [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]


def dtype_of(model: Any) -> torch.dtype:
    """Return the dtype in which a model's blocks are computed and stored."""
    return _computed_in(next(model.parameters()))


def _computed_in(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
