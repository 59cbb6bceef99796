"""Everything that only a GPU can show, unattended and within ten minutes: parity, speed, curves, resume, a run.

    make benchmark-gpu            or: PYTHONPATH=src python benchmarks/gpu.py [--out build/gpu] [--data cifar10]

Needs a machine with a CUDA build of PyTorch; what else is missing is installed by pip if there is a network. Each
stage is a process with a time limit: one that fails or takes too long is written down, and the next one begins.
Results: `OUT/records.jsonl` (one record for each row), `OUT/summary.json` (each stage: done, failed, seconds),
`OUT/<stage>.log`. Parity comes first: without it no speed counts.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("timm", "pytorch_lightning", "torchmetrics", "sklearn", "tensorboard", "pytest", "rich", "yaml")
PACKAGES = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
FEW = "eager-bf16-nchw,eager-bf16-nhwc,compile-default-bf16"  # max-autotune compiles for minutes at these sizes
# stage: arguments of `convmixer benchmark`, time limit in seconds
ROWS = {
    "train-256-p2": ("train --model convmixer_256_8_p2_k5 --batch-size 512", 75),
    "train-256-p1": ("train --model convmixer_256_8_p1_k9 --batch-size 256", 75),
    "train-768": (f"train --model convmixer_768_32 --batch-size 64 --peers {FEW}", 90),
    "train-1536": (f"train --model convmixer_1536_20 --batch-size 64 --peers {FEW}", 90),
    "infer-768-1": (f"infer --model convmixer_768_32 --batch-size 1 --peers {FEW}", 50),
    "infer-768-16": (f"infer --model convmixer_768_32 --batch-size 16 --peers {FEW}", 40),
    "infer-768-256": (f"infer --model convmixer_768_32 --batch-size 256 --peers {FEW}", 40),
    "infer-1536-1": (f"infer --model convmixer_1536_20 --batch-size 1 --peers {FEW}", 50),
    "infer-1536-16": (f"infer --model convmixer_1536_20 --batch-size 16 --peers {FEW}", 40),
    "infer-1536-256": (f"infer --model convmixer_1536_20 --batch-size 256 --peers {FEW}", 40),
}
# 300 steps on seeded noise with and without kernels; prints the losses as the last line
CURVES = """
import json, os, sys, torch, torch.nn.functional as F
from convmixer.device import choose_device
from convmixer.fast import accelerate
from convmixer.models.convmixer import ConvMixer
choose_device("cuda")
def losses(kernels, bf16):
    torch.manual_seed(0)
    model = ConvMixer(64, 4, 5, 2, num_classes=10).cuda()
    model = accelerate(model) if kernels else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(1)
    images, labels = torch.randn(512, 3, 32, 32, generator=draw).cuda(), torch.arange(512).cuda() % 10
    found = []
    for step in range(300):
        part = slice(step % 4 * 128, step % 4 * 128 + 128)
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images[part]), labels[part])
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return [round(float(value), 6) for value in found]
print(json.dumps({f"{'bf16' if b else 'fp32'}-{'kernels' if k else 'plain'}": losses(k, b)
                  for b in (False, True) for k in (True, False)}))
"""
RUN = "--model convmixer_64_4_p1_k5 --epochs 8 --batch-size 64 --workers 2 --device cuda --checkpoint-seconds 0.2"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), default=ROOT / "build" / "gpu")
    parser.add_argument("--data", default="cifar10", help="CIFAR-10, as `convmixer train` takes it")
    parser.add_argument("--stages", help="A,B: these alone")
    parser.add_argument("--seconds", type=float, default=590, help="of all stages together (default: 590)")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("there is no CUDA device here: nothing was measured", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    _install()
    stages = _stages(options.out, options.data)
    chosen = options.stages.split(",") if options.stages else list(stages)
    summary: dict[str, Any] = {}
    end = time.monotonic() + options.seconds
    for name in chosen:
        command, limit = stages[name]
        summary[name] = _stage(name, command, min(limit, end - time.monotonic()), options.out)
        (options.out / "summary.json").write_text(json.dumps(summary, indent=1))
        print(f"{name:16s} {summary[name]['status']:8s} {summary[name]['seconds']:6.0f} s", flush=True)
    return int(any(stage["status"] != "done" for stage in summary.values()))


def _install() -> None:
    missing = [PACKAGES.get(name, name).replace("_", "-") for name in NEEDED if not importlib.util.find_spec(name)]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=False)


def _stages(out: Path, data: str) -> dict[str, tuple[list[str], int]]:
    """Return each stage's command and its time limit in seconds, in order."""
    convmixer, record = [sys.executable, "-m", "convmixer"], str(out / "records.jsonl")
    # without the project's own pytest settings, which need its test tools
    tests = [sys.executable, "-m", "pytest", "-x", "-q", "-c", os.devnull, "tests/test_cuda_kernels.py"]
    stages = {"parity": (tests, 150)}
    for name, (row, limit) in ROWS.items():
        command = [*convmixer, "benchmark", *row.split(), "--device", "cuda", "--record", record, "--rounds", "5"]
        stages[name] = (command, limit)
    folder = out / f"cifar10-{int(time.time())}"
    train = [*convmixer, "train", data, "--recipe", "authors-cifar10", "--device", "cuda", "--out", str(folder)]
    stages["cifar10"] = ([*train, "--json"], 240)
    stages["curves"] = ([sys.executable, "-c", CURVES], 60)
    stages["resume"] = ([sys.executable, str(Path(__file__).resolve()), "--resume-check", str(out)], 90)
    return stages


def _stage(name: str, command: list[str], limit: float, out: Path) -> dict[str, Any]:
    if limit <= 0:
        return {"status": "no time", "seconds": 0.0}
    start, env = time.monotonic(), os.environ | {"PYTHONPATH": str(ROOT / "src")}
    with (out / f"{name}.log").open("w") as log:
        # in a new session, so that loaders and compilers end with it
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            status = "done" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "too long"
    return {"status": status, "seconds": time.monotonic() - start}


def resume_check(out: Path) -> int:
    """Train, train again with a SIGKILL in between, and compare the last weights in every bit."""
    from convmixer.models.weights import load_model

    base = [sys.executable, "-m", "convmixer", "train"]
    folders = [out / f"resume-{name}-{int(time.time())}" for name in ("whole", "killed")]
    commands = [[*base, "digits", "--out", str(folder), *RUN.split()] for folder in folders]
    subprocess.run(commands[0], check=True)
    process = subprocess.Popen(commands[1])
    metrics = folders[1] / "metrics.csv"
    while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 4):
        time.sleep(0.02)
    was_running = process.poll() is None
    process.kill()
    process.wait()
    subprocess.run([*base, "--resume", str(folders[1])], check=True)
    first, second = (load_model(folder / "weights" / "last").model.state_dict() for folder in folders)
    different = [key for key, value in first.items() if not value.equal(second[key])]
    print(json.dumps({"killed_while_running": was_running, "different": different}))
    return int(bool(different) or not was_running)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--resume-check"]:
        sys.exit(resume_check(Path(sys.argv[2])))
    sys.exit(main())
