"""Measure how time and memory of a training grow, fit models to that, and write docs/scaling.md's section on it.

    python tools/growth.py                  # measure (8 minutes on two idle cores), record, write the section
    python tools/growth.py --small --out build/growth.jsonl   # try it: small sizes, no section
    python tools/growth.py --page           # write the section from the record

Each measurement runs in a fresh process. Nothing is fitted to what the section calls held out or a prediction.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "records" / "growth.jsonl"
PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- growth: written by tools/growth.py -->", "<!-- growth: end -->"
IMAGENET = {"images": 1_281_167, "epochs": 150, "dim": 1536, "depth": 20, "kernel": 9, "patches": 1024, "batch": 16}
NETWORK = 1.25e9  # bytes a second between machines, 10 Gbit/s: assumed, not measured
BASE = {"dim": 128, "depth": 8, "kernel": 5, "patches": 256, "batch": 32}
VARIED = {"batch": (8, 16, 64), "dim": (64, 256, 512), "depth": (4, 16), "patches": (64, 1024), "kernel": (9,)}
HELD_OUT = {"dim": 384, "depth": 12, "kernel": 7, "patches": 256, "batch": 16}


# Measure


def measure(small: bool) -> dict[str, Any]:
    """Return everything that is measured."""
    counts = (200, 400) if small else (1_000, 5_000, 20_000, 50_000)
    listed = 2_000 if small else IMAGENET["images"]
    cases = [BASE, *({**BASE, name: value} for name, values in VARIED.items() for value in values)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        sets = [_write_images(Path(folder) / str(count), count) for count in counts]
        listing = _write_listing(sets[0], listed)
        found = {
            "starts": [_start(path, count) for path, count in zip(sets, counts, strict=True)],
            "listing": _start(listing, listed),
            "steps": [case | _fresh("step", **case) for case in (cases[:5] if small else cases)],
            "held_out": HELD_OUT | _fresh("step", **HELD_OUT),
            "workers": [_fresh("load", data=str(sets[-1]), workers=workers) for workers in (0, 1, 2)],
            "processes": [_train(Path(folder), processes) for processes in (1, 2)],
        }
    return found | {"all_reduce": _reduced(small)}


def _write_images(folder: Path, count: int) -> Path:
    """Write distinct images of 32 x 32 pixels into ten class folders."""
    from PIL import Image

    noise = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class {number % 10}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path, compress_level=0)
    return folder


def _write_listing(folder: Path, rows: int) -> Path:
    """Write a table of many rows that name few real files, over and over."""
    files = sorted(folder.glob("*/*.png"))
    lines = [f"{file.relative_to(folder)},{file.parent.name}\n" for file in files]
    table = folder / "listing.csv"
    table.write_text("path,label\n" + "".join(lines[i % len(lines)] for i in range(rows)))
    return table


def _start(data: Path, images: int) -> dict[str, Any]:
    """Return what it takes to read data before the first step, the first time and again."""
    first, again = (_fresh("read", data=str(data)) for _ in range(2))
    return {"images": images, **first, "again_seconds": again["seconds"]}


def _fresh(probe: str, **request: Any) -> dict[str, Any]:
    """Return what one of the probes below gives in a new process."""
    print(f"{probe} {request}", file=sys.stderr)
    return _last_line([sys.executable, __file__, "--probe", probe, json.dumps(request)])


def _last_line(command: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_output(command).splitlines()[-1])
    return found


def _output(command: Sequence[str], **environment: str) -> str:
    variables = os.environ | {"PYTHONPATH": str(ROOT / "src")} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def _train(folder: Path, processes: int) -> dict[str, Any]:
    """Return the speed of a short training by processes of one thread each."""
    out = folder / f"run-{processes}"
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    settings = "train digits --model convmixer_64_6_p1_k5 --epochs 3 --batch-size 64 --workers 0 --draw false"
    command = [sys.executable, *launch, "-m", "convmixer", *settings.split(), "--out", str(out)]
    _output(command, OMP_NUM_THREADS="1")
    results = json.loads((out / "record.jsonl").read_text(encoding="utf-8"))["results"]
    return {"processes": processes, "images_per_second": results["images_per_second"]}


def _reduced(small: bool) -> list[dict[str, Any]]:
    sizes = (1e5, 1e6) if small else (1e5, 1e6, 4e6, 16e6, 64e6)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__]
    return [_last_line([*launch, "--probe", "reduce", json.dumps({"size": int(size)})]) for size in sizes]


# Probes, each in its own process


def read(data: str) -> dict[str, Any]:
    from convmixer.data.datasets import load_data

    before, began = _peak_bytes(), time.perf_counter()
    load_data(data, val_fraction=0.1, seed=0, max_bad_fraction=0.01)
    return {"seconds": time.perf_counter() - began, "bytes": _peak_bytes() - before}


def step(dim: int, depth: int, kernel: int, patches: int, batch: int) -> dict[str, Any]:
    import torch

    from convmixer.config import Config
    from convmixer.device import count_memory
    from convmixer.fast import accelerate
    from convmixer.models.convmixer import ConvMixer
    from convmixer.train.engine import measure_speed
    from convmixer.train.module import TrainingModule

    side = 2 * round(patches**0.5)
    model = accelerate(ConvMixer(dim, depth, kernel, 2, num_classes=10))
    module = TrainingModule(model, Config(precision="bf16"), num_classes=10, steps_per_epoch=100, epochs=1)
    batches = [[torch.randn(batch, 3, side, side), torch.arange(batch) % 10]] * 12
    peak = count_memory(torch.device("cpu"))
    seconds = statistics.median(measure_speed(module, batches, steps=6))
    return {"seconds": seconds, "bytes": peak(), "parameters": sum(p.numel() for p in model.parameters())}


def load(data: str, workers: int) -> dict[str, Any]:
    from convmixer.config import Config
    from convmixer.train.setup import prepare

    job = prepare(data, Config(model="convmixer_8_1_p4_k3", batch_size=50, workers=workers))
    batches = iter(job.train_loader(workers=workers))
    for _ in range(3):
        next(batches)
    began, count = time.perf_counter(), 40
    for _ in range(count):
        next(batches)
    return {"workers": workers, "images_per_second": count * 50 / (time.perf_counter() - began)}


def reduce(size: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    values, times = torch.zeros(size // 4), []
    for _ in range(12):
        began = time.perf_counter()
        dist.all_reduce(values)
        times.append(time.perf_counter() - began)
    dist.destroy_process_group()
    return {"bytes": size, "seconds": statistics.median(times[2:])}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Fit


def terms(case: dict[str, Any]) -> list[float]:
    """Return what a step's time is made of: pointwise and depthwise products, values moved, parameters, and 1."""
    values = case["batch"] * case["patches"] * case["depth"] * case["dim"]
    return [values * case["dim"], values * case["kernel"] ** 2, values, _parameters(case), 1.0]


def memory_terms(case: dict[str, Any]) -> list[float]:
    return [case["batch"] * case["patches"] * case["depth"] * case["dim"], _parameters(case), 1.0]


def _parameters(case: dict[str, Any]) -> float:
    return float(case["depth"] * case["dim"] * (case["kernel"] ** 2 + case["dim"]))


def fit(rows: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float]:
    """Return coefficients, none below 0, with the least squared relative error."""
    from scipy.optimize import nnls

    a, y = np.array(rows, float), np.array(wanted, float)
    scale = a.max(axis=0)
    solution, _ = nnls(a / scale / y[:, None], np.ones(len(y)))
    return list(solution / scale)


def apply(coefficients: Sequence[float], row: Sequence[float]) -> float:
    return sum(c * x for c, x in zip(coefficients, row, strict=True))


def models(found: dict[str, Any]) -> dict[str, list[float]]:
    """Return the coefficients of every model."""
    starts, steps, reduced = found["starts"], found["steps"], found["all_reduce"]
    images = [[s["images"], 1.0] for s in starts]
    return {
        "start": fit(images, [s["seconds"] for s in starts]),
        "again": fit(images, [s["again_seconds"] for s in starts]),
        "start_bytes": fit(images, [s["bytes"] for s in starts]),
        "step": fit([terms(s) for s in steps], [s["seconds"] for s in steps]),
        "step_bytes": fit([memory_terms(s) for s in steps], [s["bytes"] for s in steps]),
        "all_reduce": fit([[r["bytes"], 1.0] for r in reduced], [r["seconds"] for r in reduced]),
    }


def predicted(model: dict[str, list[float]], machines: int) -> dict[str, float]:
    """Return what an epoch of ConvMixer-1536/20 on ImageNet-1k takes on so many machines."""
    case = IMAGENET
    computing = apply(model["step"], terms(case))
    # a ring passes each gradient twice, less a part, and waits for each neighbour
    moved = 4 * _parameters(case) * 2 * (machines - 1) / machines
    talking = moved / NETWORK + 2 * (machines - 1) * model["all_reduce"][1]
    steps = case["images"] / (case["batch"] * machines)
    return {
        "step": computing + talking,
        "share": talking / (computing + talking),
        "epoch": steps * (computing + talking),
        "bytes": apply(model["step_bytes"], memory_terms(case)),
    }


# Show


def section(record: dict[str, Any]) -> str:
    """Return the section of the page."""
    found, model = record["results"], models(record["results"])
    held, far = found["held_out"], found["listing"]
    off = [apply(model["step"], terms(s)) / s["seconds"] - 1 for s in found["steps"]]
    e = record["environment"]
    lines = [
        f"Measured on {e['processor']}, {e['cores']} cores, {record['date'][:10]}, bf16, each in a fresh process.",
        "",
        "| images (32 px PNG files, in the page cache) | first start | again | memory |",
        "|---|---|---|---|",
        *(_start_row(s, f"{s['images']:,}") for s in found["starts"]),
        _start_row(far, f"{far['images']:,} rows of a table, which point to {found['starts'][0]['images']:,} files"),
        "",
        f"Fitted: first {_line(model['start'])}; again {_line(model['again'])}; memory "
        f"{model['start_bytes'][0]:.0f} bytes an image. For the last row, which was left out of the fit, it predicts "
        f"{apply(model['start'], [far['images'], 1]):.0f} s, {apply(model['again'], [far['images'], 1]):.0f} s and "
        f"{apply(model['start_bytes'], [far['images'], 1]) / 1e9:.1f} GB.",
        "",
        "| batch | dim | depth | k | patches | step, ms | fitted | memory, MB | fitted |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_step_row(s, model) for s in [*found["steps"], held]),
        "",
        "The last row was held out. A step takes "
        f"{model['step'][0] * 1e12:.2f} ps per pointwise multiplication, "
        f"{model['step'][1] * 1e12:.2f} ps per depthwise multiplication, "
        f"{model['step'][2] * 1e9:.2f} ns per value passed between blocks, "
        f"{model['step'][3] * 1e9:.2f} ns per parameter, and a constant {model['step'][4] * 1e3:.1f} ms; "
        f"the fit is off by {min(off):+.0%} to {max(off):+.0%}. "
        f"Memory: {model['step_bytes'][0]:.1f} bytes per value, {model['step_bytes'][1]:.0f} per parameter.",
        "",
        f"Loading, 32 px: {_speeds(found['workers'], 'workers', 'worker')}. "
        f"Training on digits, one thread a process: {_speeds(found['processes'], 'processes', 'process')}. "
        "Two processes on this machine sum gradients in "
        f"{model['all_reduce'][1] * 1e3:.1f} ms plus {model['all_reduce'][0] * 1e9:.2f} ms per MB.",
        "",
        *_predictions(model, e),
    ]
    return "\n".join(lines)


def _start_row(s: dict[str, Any], name: str) -> str:
    return f"| {name} | {s['seconds']:.2f} s | {s['again_seconds']:.2f} s | {s['bytes'] / 1e6:,.0f} MB |"


def _step_row(s: dict[str, Any], model: dict[str, list[float]]) -> str:
    cells = [str(s[name]) for name in ("batch", "dim", "depth", "kernel", "patches")]
    cells += [f"{s['seconds'] * 1e3:.0f}", f"{apply(model['step'], terms(s)) * 1e3:.0f}"]
    cells += [f"{s['bytes'] / 1e6:.0f}", f"{apply(model['step_bytes'], memory_terms(s)) / 1e6:.0f}"]
    return f"| {' | '.join(cells)} |"


def _line(model: Sequence[float]) -> str:
    return f"{model[1]:.2f} s + {model[0] * 1e6:.1f} µs an image"


def _speeds(rows: Sequence[dict[str, Any]], names: str, one: str) -> str:
    return ", ".join(
        f"{row[names]} {one if row[names] == 1 else names}: {row['images_per_second']:,.0f} images/s" for row in rows
    )


def _predictions(model: dict[str, list[float]], environment: dict[str, Any]) -> list[str]:
    case = IMAGENET
    rows = []
    for machines in (1, 8, 64):
        p = predicted(model, machines)
        days = p["epoch"] * case["epochs"] / 86400
        rows.append(
            f"| {machines} | {p['step']:.1f} s | {p['share']:.1%} | {p['epoch'] / 3600:,.0f} h | {days:,.0f} |"
        )
    return [
        "**A prediction, not a measurement**: ConvMixer-1536/20 (k 9, 1,024 patches) on ImageNet-1k, "
        f"{case['batch']} images a step on each machine, {environment['cores']} such cores a machine, a network of "
        f"10 Gbit/s. Each process needs {predicted(model, 1)['bytes'] / 1e9:.0f} GB of memory. The "
        "prediction extrapolates far beyond what was measured, "
        "leaves out loading and evaluation, and assumes that no machine is slower than another.",
        "",
        f"| machines | a step | share of the network | an epoch | {case['epochs']} epochs, days |",
        "|---|---|---|---|---|",
        *rows,
    ]


def write_page() -> None:
    """Replace the section of the page by that of the record."""
    record = json.loads(RECORD.read_text(encoding="utf-8").splitlines()[-1])
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{section(record)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--small", action="store_true", help="small sizes, to try it")
    parser.add_argument("--out", type=Path, default=RECORD, help="the record")
    parser.add_argument("--page", action="store_true", help="only write the section from the record")
    parser.add_argument("--probe", nargs=2, metavar=("NAME", "JSON"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        probes = {"read": read, "step": step, "load": load, "reduce": reduce}
        found = probes[args.probe[0]](**json.loads(args.probe[1]))
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            print(json.dumps(found))
        return
    if not args.page:
        from convmixer import records

        found = measure(args.small)
        results = records.RunRecord("growth", records.command_line(), {"small": args.small}, {}, found)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.unlink(missing_ok=True)
        records.write(args.out, results)
        if args.out != RECORD:
            print(section(json.loads(args.out.read_text(encoding="utf-8"))))
            return
    write_page()


if __name__ == "__main__":
    main()
