"""Measures ours and PyTorch on a GPU: steps timed in turn by CUDA events, step memory, and the GPU's own bound."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from convmixer import records
from convmixer.benchmark.case import Case, batch, build
from convmixer.benchmark.measure import time_limit
from convmixer.device import choose_device
from convmixer.errors import RequestError
from convmixer.fast import accelerate, has_kernels, optimize_for_inference
from convmixer.records import version_of

Step = Callable[[], object]
WARM_UP = 3
GRAPHED = (
    "reduce-overhead",
    "max-autotune",
)  # torch.compile's modes that use CUDA graphs, whose memory is not counted
# the fewest times that a block must move one of its tensors through memory: forward 5, backward 9
LEAST_COPIES = {"train": 14, "infer": 4}
PRODUCTS = {"train": 3, "infer": 1}


def contenders(case: Case) -> dict[str, Callable[[torch.device], Step]]:
    """Return ours and the peers by name; each prepares itself on a device."""
    precisions = ("bf16", "fp32") if case.precision == "bf16" and case.task == "train" else (case.precision,)
    found: dict[str, Callable[[torch.device], Step]] = {"ours": lambda device: _ours(case, device)}
    for precision in precisions:
        for layout in ("nchw", "nhwc"):
            found[f"eager-{precision}-{layout}"] = _peer(case, precision, layout == "nhwc", None)
    found |= {
        f"compile-{mode}-{case.precision}": _peer(case, case.precision, True, mode) for mode in ("default", *GRAPHED)
    }
    return found


def benchmark_gpu(
    case: Case,
    selected: list[str] | None = None,
    rounds: int = 7,
    sample_seconds: float = 0.3,
    record: Path | None = None,
    device_name: str = "cuda",
    compile_limit: int = 300,
) -> dict[str, Any]:
    """Measure ours and the peers (other runtimes) on a GPU and return all figures.

    Peers may choose cuDNN's algorithms by trial, and need not be deterministic; ours use none of cuDNN.

    Args:
        case: The network and how to run it.
        selected: Names of the peers to measure; None: all.
        rounds: Turns of each contender; 0: only prepare them, which fills the caches of the compilers.
        sample_seconds: Minimum seconds per turn.
        record: JSON-lines file to append a `RunRecord` to.
        device_name: "cuda", or "cpu" to try the measurement itself.
        compile_limit: Seconds that a peer may take until its first steps are done.

    Returns:
        As `benchmark.run.benchmark`; `bound_images_per_second` is the GPU's, from its measured rate of copies or
        matrix multiplications. `memory` is that of a step, `total_memory` includes weights and optimizer (bytes).

    Raises:
        RequestError: There is no such device, no kernels for it, or a selected peer is not known.
    """
    device = choose_device(device_name)
    if not has_kernels(device, case.precision):
        raise RequestError(f"the benchmark needs the kernels, and there are none for {device} in {case.precision}")
    makers = contenders(case)
    if unknown := set(selected or []) - makers.keys():
        raise RequestError(f"no such peers: {', '.join(sorted(unknown))}; there are {', '.join(makers)}")
    wanted = [name for name in makers if name == "ours" or selected is None or name in selected]
    if not rounds:
        wanted.reverse()  # ours then finds what the others have compiled meanwhile
        return {"missing": _all_prepared({name: makers[name] for name in wanted}, device, compile_limit)[1]}
    with _free_choice(device):
        prepared, missing = _all_prepared({name: makers[name] for name in wanted}, device, compile_limit)
        clocks = [_card()]
        times = _interleave({name: found.step for name, found in prepared.items()}, rounds, sample_seconds, device)
        clocks.append(_card())
        result = _result(case, times, prepared, _rates(device, case.precision))
    result |= {"missing": missing, "rounds": rounds, "sample_seconds": sample_seconds, "card": clocks}
    result["versions"] = {
        "triton": version_of("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    _print(result)
    if record:
        name = f"benchmark-gpu-{case.task}-{case.model}-b{case.batch_size}-{case.precision}"
        data = {"name": "seeded noise", "img_size": case.img_size, "batch_size": case.batch_size}
        records.append(record, records.RunRecord(name, records.command_line(), asdict(case), data, result, seed=0))
    return result


def _ours(case: Case, device: torch.device) -> Step:
    model, (images, labels) = build(case).to(device), (t.to(device) for t in batch(case))
    if case.task == "infer":
        fast = optimize_for_inference(model.eval(), case.precision)
        return lambda: fast(images)
    return _train_step(accelerate(model), images, labels, case.precision)


def _peer(case: Case, precision: str, nhwc: bool, mode: str | None) -> Callable[[torch.device], Step]:
    def prepare(device: torch.device) -> Step:
        layout = torch.channels_last if nhwc else torch.contiguous_format
        model: Any = build(case).to(device).to(memory_format=layout)
        images, labels = (t.to(device) for t in batch(case))
        images = images.to(memory_format=layout)
        if case.task == "infer":
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            model, images = model.eval().to(dtype), images.to(dtype)
        model = torch.compile(model, mode=mode) if mode else model
        if case.task == "train":
            return _train_step(model, images, labels, precision)

        def step() -> object:
            with torch.inference_mode():
                return model(images)

        return step

    return prepare


def _train_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str) -> Step:
    on_gpu = images.is_cuda
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True, capturable=on_gpu)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def _all_prepared(
    makers: dict[str, Callable[[torch.device], Step]], device: torch.device, compile_limit: int
) -> tuple[dict[str, "_Prepared"], dict[str, str]]:
    """Return the contenders that are ready, and why others are not. One that fails must not end the benchmark."""
    prepared, missing = {}, {}
    for name, make in makers.items():
        if name.startswith("compile-") and not compile_limit:
            missing[name] = "compile limit 0"
            continue
        start = time.perf_counter()
        try:
            with time_limit(0 if name == "ours" else compile_limit):
                prepared[name] = _prepared(make, device, counted=not any(mode in name for mode in GRAPHED))
        except Exception as error:
            if name == "ours":
                raise
            missing[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        said = f"missing: {missing[name]}" if name in missing else "ready"
        print(f"{name} is {said} after {time.perf_counter() - start:.1f} s", flush=True)
    return prepared, missing


@dataclass(frozen=True)
class _Prepared:
    """A warmed-up step, and its memory in bytes: without and with what was held before it; None if not counted."""

    step: Step
    memory: int | None = None
    total_memory: int | None = None


def _prepared(make: Callable[[torch.device], Step], device: torch.device, counted: bool) -> _Prepared:
    if device.type != "cuda":
        step = make(device)
        step()
        return _Prepared(step)
    torch.cuda.empty_cache()
    others = torch.cuda.memory_allocated()
    step = make(device)
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return _Prepared(step, peak - held, peak - others) if counted else _Prepared(step)


@contextmanager
def _free_choice(device: torch.device) -> Iterator[None]:
    """Let cuDNN choose its algorithms by timing them, as for the highest speed."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = device.type == "cuda", False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def _as_graph(step: Step) -> Step:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch asks of a step before a capture
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _interleave(
    steps: dict[str, Step], rounds: int, sample_seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Return seconds per step of each contender, one value per round, measured alternately."""
    if device.type == "cuda" and "train_step" in getattr(steps["ours"], "__qualname__", ""):
        steps = steps | {"ours": _as_graph(steps["ours"])}  # as in `convmixer train`
    counts = {name: max(1, round(sample_seconds / _seconds(step, 2, device))) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            times[name].append(_seconds(step, counts[name], device))
    return times


def _seconds(step: Step, count: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - start) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / count


def _rates(device: torch.device, precision: str) -> dict[str, float]:
    """Return the bytes per second of a copy (bytes read plus bytes written), and the operations per second of a
    matrix multiplication.
    """
    on_gpu = device.type == "cuda"
    x = torch.empty(2**29 if on_gpu else 2**24, dtype=torch.uint8, device=device)
    y, side = torch.empty_like(x), 8192 if on_gpu else 256
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    steps: dict[str, tuple[Step, float]] = {
        "copied_bytes_per_second": (lambda: y.copy_(x), 2 * x.numel()),
        "products_per_second": (lambda: a @ b, 2 * side**3),
    }
    rates = {}
    for name, (step, amount) in steps.items():
        step()
        rates[name] = amount / min(_seconds(step, 10, device) for _ in range(3))
    return rates


def bound(case: Case, rates: dict[str, float]) -> float:
    """Return the GPU's limit in images per second, from the slower of its copies and its matrix multiplications."""
    positions = (case.img_size // case.patch_size) ** 2
    size = 2 if case.precision == "bf16" else 4
    moved = LEAST_COPIES[case.task] * positions * case.dim * size * case.depth
    products = PRODUCTS[case.task] * 2 * positions * case.dim**2 * case.depth
    return 1 / max(moved / rates["copied_bytes_per_second"], products / rates["products_per_second"])


def _result(
    case: Case, times: dict[str, list[float]], prepared: dict[str, _Prepared], rates: dict[str, float]
) -> dict[str, Any]:
    speeds = {}
    for name, seconds in times.items():
        values = [case.batch_size / s for s in seconds]
        speeds[name] = {"images_per_second": median(values), "min": min(values), "max": max(values)}
    mine = speeds.pop("ours")
    best = max(speeds, key=lambda name: speeds[name]["images_per_second"], default=None)
    limit = bound(case, rates)
    memory = {name: found.memory for name, found in prepared.items()}
    others = [peak for name, peak in memory.items() if name != "ours" and f"-{case.precision}" in name and peak]
    ours = memory["ours"]
    return {
        **asdict(case),
        "model": case.model,
        "ours": mine,
        "peers": speeds,
        "best_peer": best,
        "ratio": mine["images_per_second"] / speeds[best]["images_per_second"] if best else None,
        **rates,
        "bound_images_per_second": limit,
        "share_of_bound": mine["images_per_second"] / limit,
        "memory": memory,
        "total_memory": {name: found.total_memory for name, found in prepared.items()},
        "peak_memory_ratio": ours / min(others) if ours and others else None,
    }


def _card() -> str | None:
    """Return the GPU's name, driver, clocks (MHz) and power (W), as nvidia-smi reports them now."""
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _print(result: dict[str, Any]) -> None:
    print(f"{result['model']} {result['task']}, batch {result['batch_size']}, {result['precision']}; images/s")
    for name, rate in {"ours": result["ours"], **result["peers"]}.items():
        peak = result["memory"].get(name)
        line = f"  {name:28s} {rate['images_per_second']:12.0f}  ({rate['min']:.0f} to {rate['max']:.0f})"
        print(line + (f"  {peak / 2**20:.0f} MiB step memory" if peak else ""))
    for name, reason in result["missing"].items():
        print(f"  {name:28s} not measured: {reason}")
    ratio = "" if result["ratio"] is None else f"{result['ratio']:.2f}x the best peer, "
    print(f"  ours: {ratio}{result['share_of_bound']:.0%} of the bound")
