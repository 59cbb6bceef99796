"""Measures speed (steps interleaved in rounds), the bound set by matrix multiplications, and peak memory."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from types import FrameType

import torch

from convmixer.benchmark import memory
from convmixer.benchmark.case import Case
from convmixer.benchmark.contenders import Step
from convmixer.device import native_bf16
from convmixer.probe import fresh

LONG_SECONDS = 0.3


def interleave(steps: Mapping[str, Step], rounds: int, sample_seconds: float) -> dict[str, list[float]]:
    """Return seconds per step of each contender, one value per round; each round is one turn of all contenders.

    Each turn starts with an untimed step, because the previous contender left the caches and the thread pool in its
    own state. Steps longer than `LONG_SECONDS` do not need it.

    Args:
        steps: Contender -> its step, which has run before.
        rounds: Values per contender.
        sample_seconds: Minimum seconds per turn; short steps are repeated.
    """
    first = {name: _seconds(step, 1) for name, step in steps.items()}
    counts = {name: max(1, math.ceil(sample_seconds / max(first[name], 1e-6))) for name in steps}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            if first[name] < LONG_SECONDS:
                step()
            times[name].append(_seconds(step, counts[name]))
    return times


def _seconds(step: Step, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - start) / count


def summary(case: Case, seconds: list[float]) -> dict[str, float]:
    """Return images per second: the median, the slowest and the fastest round."""
    rates = [case.batch_size / s for s in seconds]
    return {"images_per_second": median(rates), "min": min(rates), "max": max(rates)}


def gemm_steps(case: Case) -> dict[str, Step]:
    """Return steps that do only the matrix multiplications of all pointwise layers, one step for each library.

    For inference this is the forward pass (rows x dim x dim); for training also the gradients of the input and of the
    weight. The fastest of the steps is the bound that benchmarks report.
    """
    kinds: dict[str, Callable[[Case], Step]] = {"mm": _mm}
    if _product_dtype(case) is torch.float32:
        kinds["conv"] = _conv  # oneDNN, while `mm` in fp32 uses MKL or OpenBLAS
    if case.precision == "int8":
        kinds = {"int_mm": _int_mm}
    return {f"gemm-{name}": make(case) for name, make in kinds.items()}


def _product_dtype(case: Case) -> torch.dtype:
    """Return the dtype of multiplications in the case's precision; fp32 in place of bf16 if bf16 is emulated."""
    return torch.bfloat16 if case.precision == "bf16" and native_bf16() else torch.float32


def _mm(case: Case) -> Step:
    dtype = _product_dtype(case)
    x, y, g = (torch.randn(case.rows, case.dim).to(dtype) for _ in range(3))
    weights = [torch.randn(case.dim, case.dim).to(dtype) for _ in range(case.depth)]
    grad = torch.empty(case.dim, case.dim, dtype=dtype)

    def step() -> None:
        for w in weights:
            torch.mm(x, w.t(), out=y)
            if case.task == "train":
                torch.mm(y, w, out=g)
                torch.mm(y.t(), x, out=grad)

    return step


def _conv(case: Case) -> Step:
    x = torch.randn(1, case.dim, case.rows, 1).to(memory_format=torch.channels_last)
    weights = [torch.randn(case.dim, case.dim, 1, 1) for _ in range(case.depth)]
    sizes = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)

    def step() -> None:
        for w in weights:
            torch.conv2d(x, w)
            if case.task == "train":
                torch.ops.aten.convolution_backward(x, x, w, None, *sizes, [True, True, False])

    return step


def _int_mm(case: Case) -> Step:
    rows = max(case.rows, 17)  # the smallest number of rows that it accepts
    x = torch.randint(-127, 127, (rows, case.dim), dtype=torch.int8)
    weights = [torch.randint(-127, 127, (case.dim, case.dim), dtype=torch.int8) for _ in range(case.depth)]

    def step() -> None:
        for w in weights:
            torch._int_mm(x, w.t())

    return step


def peak_memory(case: Case, name: str) -> int:
    """Return the step memory of a contender in bytes, measured in a fresh process.

    The process first runs one step on the smallest images, then builds the case, resets the peak of its resident
    memory and runs three steps. Step memory is this peak minus the memory held before the steps, minus gradients and
    optimizer state.

    Raises:
        RequestError: The process failed; the message is the last line that it wrote.
    """
    return int(fresh(memory.measured_here, {"case": asdict(case), "name": name}, OMP_NUM_THREADS=str(case.threads)))


def can_measure_memory() -> bool:
    """Return whether the system can reset the peak of a process (Linux)."""
    return Path("/proc/self/clear_refs").exists()


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in the block after that many seconds; 0 means no limit."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not compiled after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
