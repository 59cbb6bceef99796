"""Chooses device and precision, and measures memory. torch is imported only when it is needed."""

import contextlib
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from convmixer.errors import RequestError

if TYPE_CHECKING:
    import torch

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
GROUPS, PROCESS_GROUPS = "/sys/fs/cgroup", "/proc/self/cgroup"  # control groups of Linux


def choose_device(name: str = "auto") -> "torch.device":
    """Return the device to compute on. "auto" is CUDA if there is a GPU, else Apple's MPS, else the CPU.

    On CUDA this also disables TF32, to which cuDNN would round the inputs of fp32 convolutions by default, and gives
    cuBLAS a workspace of fixed size, without which its sums may differ from run to run.

    Raises:
        RequestError: This machine does not have the device.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, found in there.items() if found)
    if not there.get(name.partition(":")[0], False):
        raise RequestError(
            f"no {name} device here: choose from {', '.join(d for d, found in there.items() if found)}"
        )
    if name.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        _allow_tf32(False)
    return torch.device(name)


def _allow_tf32(allowed: bool) -> None:
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def gpu_names() -> list[str]:
    """Return the names of the CUDA devices; an empty list if torch is not loaded, because then none is used."""
    torch = sys.modules.get("torch")
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []


def native_bf16(device: "torch.device | None" = None) -> bool:
    """Return whether the device has bf16 instructions: avx512_bf16, AMX, Arm's bf16, or those of a GPU.

    On other devices bf16 is emulated, and slower than fp32.

    Args:
        device: The device; None means the CPU.
    """
    import torch

    kind = "cpu" if device is None else device.type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind != "cpu":
        return False
    features = torch.cpu.get_capabilities()
    return any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def choose_precision(name: str = "auto", device: "torch.device | None" = None) -> str:
    """Return "fp32", "tf32", "bf16" or "fp16". "auto" is bf16 if the device has bf16 instructions, else fp32.

    bf16 and fp16 mean automatic mixed precision: matrix multiplications and convolutions in 16 bits, weights and
    normalisation in fp32. With tf32 everything is stored in fp32, and the GPU rounds the inputs of matrix
    multiplications and convolutions to 10 bits of mantissa. On a GPU this function also turns TF32 on for tf32, and
    off for other precisions.

    Raises:
        RequestError: The name is not known, or it is tf32 and the device is not a GPU.
    """
    if name not in PRECISIONS:
        raise RequestError(f"precision must be one of {', '.join(PRECISIONS)}, not {name!r}")
    on_gpu = device is not None and device.type == "cuda"
    if name == "tf32" and not on_gpu:
        raise RequestError("precision tf32 needs a GPU: choose fp32 or bf16 here")
    if on_gpu:
        _allow_tf32(name == "tf32")
    if name == "auto":
        return "bf16" if native_bf16(device) else "fp32"
    return name


def resident_bytes() -> int:
    """Return the memory that this process uses now, in bytes; if the system does not report it, the peak."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """Return the peak memory of this process since it started or since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Reset the peak of this process (Linux only)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def count_memory(device: "torch.device") -> Callable[[], int]:
    """Return a function that gives the peak bytes allocated on a GPU, or else the growth of this process."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    forget_peak()  # the peak of loading does not count
    before = resident_bytes()
    return lambda: max(0, peak_resident_bytes() - before)


def available_bytes() -> int:
    """Return the memory that is free without swapping, in bytes; if the system does not report it, all memory.

    In a container, or another control group with a memory limit, it is at most the memory that the limit leaves free.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = total_bytes()
    return min([free, *(left for _, left in _memory_limits())])


def total_bytes() -> int:
    """Return the memory of the machine in bytes, or the limit of this process's container or control group."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *(limit for limit, _ in _memory_limits())])


def _memory_limits() -> list[tuple[int, int]]:
    """Return the limit, and what of it is left, in bytes, for each control group around this process that has one."""
    found = []
    for folder, maximum, current, cached in _control_groups():
        try:
            limit, used = (int((folder / name).read_text()) for name in (maximum, current))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group, or "max": it has no limit
            continue
        # before the kernel refuses memory, it frees the cache of files that were not used lately
        found.append((limit, max(0, limit - used + int(stat.get(cached, 0)))))
    return found


def _control_groups() -> Iterator[tuple[Path, str, str, str]]:
    """Give the folder of each control group of memory around this process, and its files' names: versions 1 and 2."""
    try:
        lines = Path(PROCESS_GROUPS).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = Path(GROUPS) / "memory" if kinds else Path(GROUPS)
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        inside = Path(path.lstrip("/"))
        for part in (inside, *inside.parents):  # a container often shows its own group as the root
            yield (root / part, *(names if kinds else ("memory.max", "memory.current", "inactive_file")))


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        # last resort: on Linux this value can include the peak of the process that this one was forked from
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
