"""The CUDA kernels of the block, in Triton. Triton comes with PyTorch, so there is nothing to install or build.

Like the C++ kernels they are loaded on first use, and `why_not` says why they cannot be used.
"""

import functools
import importlib.util

import torch

from convmixer.kernels.cpu.build import switched_off
from convmixer.kernels.ops import LIBRARY

OLDEST = (8, 0)  # compute capability: the first with bf16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot run on a CUDA device with a dtype, or None. Loads them on first use."""
    if dtype not in DTYPES:
        return f"on a GPU they compute in fp32, bf16 and fp16, not in {dtype}"
    return switched_off() or _unsupported(device) or _load("CUDA")


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
        LIBRARY.impl(name, function, key, allow_override=True)
    return None
