"""The CUDA kernels of the block, written in Triton. Triton comes with PyTorch, and needs a C compiler.

They are loaded on first use. If they cannot be used, `why_not` returns the reason.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from convmixer.kernels.cpu.build import switched_off
from convmixer.kernels.ops import LIBRARY

OLDEST = (8, 0)  # the first compute capability with bf16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot run on a CUDA device with a dtype, or None. Loads them on first use."""
    if dtype not in DTYPES:
        return f"on a GPU they compute in fp32, bf16 and fp16, not in {dtype}"
    return switched_off() or _unsupported(device) or _load("CUDA") or _fails(device)


@functools.cache
def _unsupported(device: torch.device) -> str | None:
    if torch.version.hip:
        return "they are for NVIDIA GPUs, this PyTorch is for AMD GPUs"
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {found[0]}.{found[1]}, they need {OLDEST[0]}.{OLDEST[1]}"
    return None


@functools.cache
def _load(key: str) -> str | None:
    """Register the kernels for the ops under a dispatch key; return why that failed, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton, which they are written in, is not installed"
    try:
        from convmixer.kernels.cuda.ops import IMPLEMENTATIONS
    except (ImportError, AttributeError) as error:  # too old or broken
        return f"Triton does not work: {error}"
    for name, function in IMPLEMENTATIONS.items():
        LIBRARY.impl(name, _on_its_device(function) if key == "CUDA" else function, key, allow_override=True)
    return None


@functools.cache
def _fails(device: torch.device) -> str | None:
    """Launch a tiny kernel, and return why that failed, or None.

    Without a C compiler or Python's headers, for example, Triton can be imported but cannot launch a kernel.
    """
    from convmixer.kernels.cuda.sums import total

    try:
        found = _on_its_device(total)(torch.ones(2, 1, 16, device=device))
        return None if bool((found == 2).all()) else "Triton computes a wrong result for 1 + 1"
    except Exception as error:  # any of Triton's, the compiler's or the driver's
        return f"Triton does not work: {' '.join(str(error).split())[:300]}"


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that first makes its tensors' GPU current, because Triton launches on the current GPU."""

    @functools.wraps(function)
    def call(first: torch.Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):  # does nothing for tensors of a CPU
            return function(first, *rest)

    return call
