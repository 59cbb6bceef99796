"""`convmixer benchmark`: prepares ours and the peers, measures them interleaved, and writes table and record."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from convmixer import kernels, records
from convmixer.benchmark import measure
from convmixer.benchmark.case import Case
from convmixer.benchmark.contenders import Contender, Step, ours, peers
from convmixer.benchmark.fared import keep
from convmixer.errors import RequestError, unknown


def benchmark(
    case: Case,
    selected: list[str] | None = None,
    rounds: int = 7,
    sample_seconds: float = 0.3,
    compile_limit: int = 300,
    memory: bool = True,
    record: Path | None = None,
) -> dict[str, Any]:
    """Measure ours and the peers (other runtimes) and return all figures.

    Args:
        case: The network and how to run it.
        selected: Names of the peers to measure; None: all; an empty list: no peers.
        rounds: Turns of each contender.
        sample_seconds: Minimum seconds per turn.
        compile_limit: Seconds that a compiling peer may take before its first step; 0 leaves it out.
        memory: Measure peak memory too, of ours and of eager PyTorch in the same precision.
        record: JSON-lines file to append a `RunRecord` to.

    Returns:
        `ours` and `peers` (images_per_second: median, min, max), `missing` and `left_out` peers with the reason,
        `best_peer`, `ratio`, `gemm_bound_images_per_second`, `share_of_bound`, `memory` (bytes),
        `peak_memory_ratio`, and the case.

    Raises:
        RequestError: The kernels are not built, or a selected peer is not known.
    """
    _need_kernels()
    torch.set_num_threads(case.threads)
    contenders = peers(case.task, case.precision)
    left_out = _left_out(contenders, selected, compile_limit)
    steps = {"ours": _prepared(ours(case.task), case, 0)}
    for name, step in measure.gemm_steps(case).items():
        step()
        steps[name] = step
    missing: dict[str, str] = {}
    for contender in (c for c in contenders if c.name not in left_out):
        try:
            steps[contender.name] = _prepared(contender, case, compile_limit)
        except Exception as error:  # a failing peer must not end the benchmark
            missing[contender.name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    times = measure.interleave(steps, rounds, sample_seconds)
    rates = {name: measure.summary(case, seconds) for name, seconds in times.items()}
    result = _result(case, rates) | {"missing": missing, "left_out": left_out}
    if memory and measure.can_measure_memory():
        result |= _memory(case, [c for c in contenders if c.name not in left_out])
    result |= {"rounds": rounds, "sample_seconds": sample_seconds}
    _print(result)
    keep(result)
    if record:
        _append(record, case, result)
    return result


def _need_kernels() -> None:
    reason = kernels.why_not()
    if reason:
        raise RequestError(f"the benchmark needs the kernels, and they are not built: {reason}")


def _left_out(contenders: list[Contender], selected: list[str] | None, compile_limit: int) -> dict[str, str]:
    names = [c.name for c in contenders]
    for name in selected or []:
        if name not in names:
            raise unknown("peer", name, names)
    out = {} if selected is None else {name: "not selected" for name in names if name not in selected}
    return out | {c.name: "compile limit 0" for c in contenders if c.slow_start and not compile_limit}


def _prepared(contender: Contender, case: Case, compile_limit: int) -> Step:
    start = time.perf_counter()
    with measure.time_limit(compile_limit if contender.slow_start else 0):
        step = contender.prepare(case)
        step()
    print(f"{contender.name} is ready after {time.perf_counter() - start:.1f} s", flush=True)
    return step


def _result(case: Case, rates: dict[str, dict[str, float]]) -> dict[str, Any]:
    mine = rates.pop("ours")
    gemms = {name: rates.pop(name) for name in list(rates) if name.startswith("gemm-")}
    bound = max(rate["images_per_second"] for rate in gemms.values())
    best = max(rates, key=lambda name: rates[name]["images_per_second"], default=None)
    return {
        **asdict(case),
        "model": case.model,
        "ours": mine,
        "peers": rates,
        "best_peer": best,
        "ratio": mine["images_per_second"] / rates[best]["images_per_second"] if best else None,
        "gemm": gemms,
        "gemm_bound_images_per_second": bound,
        "share_of_bound": mine["images_per_second"] / bound,
    }


def _memory(case: Case, contenders: list[Contender]) -> dict[str, Any]:
    """Return the peak bytes of ours and of eager PyTorch in the same precision, and their ratio."""
    names = [c.name for c in contenders if c.name.startswith(f"eager-{case.precision}")]
    peak = {name: measure.peak_memory(case, name) for name in ("ours", *names)}
    stock = min((peak[name] for name in names), default=None)
    return {"memory": peak, "peak_memory_ratio": peak["ours"] / stock if stock else None}


def _print(result: dict[str, Any]) -> None:
    what = "training" if result["task"] == "train" else "inference"
    print(
        f"{result['model']} {what}, {result['img_size']}x{result['img_size']}, batch {result['batch_size']}, "
        f"{result['precision']}, {result['threads']} threads; images/s: median (slowest to fastest round)"
    )
    rows = {"ours": result["ours"], **result["peers"]}
    mine = result["ours"]["images_per_second"]
    for name, rate in sorted(rows.items(), key=lambda row: -row[1]["images_per_second"]):
        median = rate["images_per_second"]
        line = f"  {name:28s} {median:10.2f}  ({rate['min']:.2f} to {rate['max']:.2f})"
        peak = result.get("memory", {}).get(name)
        print(
            line
            + f"  ours is {mine / median:.2f}x" * (name != "ours")
            + (f"  {peak / 2**20:.0f} MiB" if peak else "")
        )
    for name, reason in {**result["missing"], **result["left_out"]}.items():
        print(f"  {name:28s} not measured: {reason}")
    bound, share = result["gemm_bound_images_per_second"], result["share_of_bound"]
    print(f"  {'only pointwise multiplications':28s} {bound:10.2f}  ours reaches {share:.0%} of this bound")
    if result.get("peak_memory_ratio"):
        print(f"  step memory: {result['peak_memory_ratio']:.2f} of the smallest of eager PyTorch")


def _append(path: Path, case: Case, result: dict[str, Any]) -> None:
    name = f"benchmark-{case.task}-{case.model}-b{case.batch_size}-{case.precision}"
    data = {"name": "seeded noise", "img_size": case.img_size, "batch_size": case.batch_size}
    records.append(path, records.RunRecord(name, records.command_line(), asdict(case), data, result, seed=0))
