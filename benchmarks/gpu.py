"""Everything that only a GPU can show, unattended and within ten minutes: parity, speed, curves, resume, a run.

    make benchmark-gpu            or: PYTHONPATH=src python benchmarks/gpu.py [--out build/gpu] [--data cifar10]

Each stage is a process with a time limit, the most valuable first: one that fails or takes too long is written down,
and the next one begins. Results: `OUT/records.jsonl` (one record for each row), `OUT/summary.json` (each stage: done,
failed, seconds, last line), `OUT/<stage>.log`; `--bundle` packs them into one file after each stage. Parity comes
first: without it no speed counts. `--try` runs every stage on tiny sizes on a CPU.
"""

# On a machine without network, in one call:
# 1. Nothing is installed. Its python3 needs a CUDA build of torch >= 2.11 with its Triton, and a C compiler; further
#    timm, pytorch-lightning, torchmetrics, scikit-learn, tensorboard, safetensors, huggingface-hub, fsspec, pyarrow,
#    packaging, matplotlib, rich, pyyaml and pytest (pytest-xdist if it is there). The stage "needs" names what is
#    missing; everything else then runs as far as it can.
# 2. CIFAR-10 has to be brought along: `python benchmarks/small_cifar10.py pack FROM TO --parts 2` writes it lossless
#    in 98 MB, in parts for machines that take only so much at once. There:
#    `python3 benchmarks/small_cifar10.py unpack PART-0 PART-1 build/cifar10` (half a minute on one core). Without it,
#    the stages "cifar10-..." fail and nothing else does.
# 3. python3 benchmarks/gpu.py --data build/cifar10 --seconds 570 --bundle RESULTS/gpu.tar.gz
#    All stages together end after --seconds. The bundle holds all that has to come back.
# 4. What a first call did not reach, a second one does: the same command with --stages A,B (names as printed). On the
#    same machine compiled kernels are still in Triton's cache.

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = [
    "torch",
    "torchvision",
    "triton",
    "timm",
    "pytorch_lightning",
    "torchmetrics",
    "sklearn",
    "tensorboard",
    "safetensors",
    "huggingface_hub",
    "fsspec",
    "pyarrow",
    "packaging",
    "matplotlib",
    "rich",
    "yaml",
    "numpy",
    "PIL",
    "pytest",
]
FEW = "eager-bf16-nchw,eager-bf16-nhwc,compile-default-bf16"
SERVED = FEW + ",compile-reduce-overhead-bf16"  # one image at a time, a launch costs more than its kernel
# stage: arguments of `convmixer benchmark`, time limit in seconds
TRAIN = {
    "train-256-p2": (f"train --model convmixer_256_8_p2_k5 --batch-size 512 --peers {FEW},eager-fp32-nhwc", 70),
    "train-1536": (f"train --model convmixer_1536_20 --batch-size 64 --peers {FEW}", 90),
    "train-256-p1": (f"train --model convmixer_256_8_p1_k9 --batch-size 256 --peers {FEW}", 70),
    "train-768": (f"train --model convmixer_768_32 --batch-size 64 --peers {FEW}", 90),
}
INFER = {
    f"infer-{width}-{batch}": (f"infer --model convmixer_{width}_{depth} --batch-size {batch} --peers {SERVED}", 45)
    for batch in (1, 256, 16)
    for width, depth in ((768, 32), (1536, 20))
}
SLOW = "compile-max-autotune-bf16"  # compiles for minutes at the larger sizes
AUTOTUNE = {
    "tuned-256-p2": (f"train --model convmixer_256_8_p2_k5 --batch-size 512 --peers {SLOW}", 120),
    "tuned-infer-768-1": (f"infer --model convmixer_768_32 --batch-size 1 --peers {SLOW}", 120),
}
# 300 steps on seeded noise with and without kernels; prints the losses as the last line
CURVES = """
import json, os, sys, torch, torch.nn.functional as F
from convmixer.device import choose_device
from convmixer.fast import accelerate
from convmixer.models.convmixer import ConvMixer
place, steps = choose_device(sys.argv[1]), int(sys.argv[2])
def losses(kernels, bf16):
    torch.manual_seed(0)
    model = ConvMixer(64, 4, 5, 2, num_classes=10).to(place)
    model = accelerate(model) if kernels else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(1)
    images, labels = torch.randn(512, 3, 32, 32, generator=draw).to(place), torch.arange(512).to(place) % 10
    found = []
    for step in range(steps):
        part = slice(step % 4 * 128, step % 4 * 128 + 128)
        optimizer.zero_grad()
        with torch.autocast(place.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images[part]), labels[part])
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return [round(float(value), 6) for value in found]
curves = {f"{'bf16' if b else 'fp32'}-{'kernels' if k else 'plain'}": losses(k, b)
          for b in (False, True) for k in (True, False)}
with open(sys.argv[3], "w") as file:
    json.dump(curves, file)
mean = {name: round(sum(values[-20:]) / len(values[-20:]), 5) for name, values in curves.items()}
first = max(abs(a / b - 1) for a, b in zip(curves["fp32-kernels"][:10], curves["fp32-plain"][:10]))
print(json.dumps({"mean_of_last_20": mean, "fp32_largest_relative_difference_first_10": first}))
"""
# the whole step of `convmixer train`, graph included, in 11 GB
FITS = """
import json, sys, torch
from convmixer.config import Config
from convmixer.device import choose_device
from convmixer.fast import accelerate
from convmixer.models.create import create_model
from convmixer.train.engine import fit
from convmixer.train.module import TrainingModule
choose_device("cuda")
limit = 11e9
torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
model = accelerate(create_model("convmixer_1536_20", num_classes=1000, in_chans=3).cuda())
config = Config(precision="bf16", clip_norm=1.0)
module = TrainingModule(model, config, num_classes=1000, steps_per_epoch=9, epochs=1)
batch = [torch.randn(64, 3, 224, 224).pin_memory(), torch.arange(64).pin_memory()]
fit(module, [batch] * 6, 6, lambda: False)
torch.cuda.synchronize()
print(json.dumps({"reserved": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated(),
                  "limit": limit, "graph": bool(module._update.possible), "loss": float(module.loss_sum) / 6}))
"""
RUN = "--model {model} --epochs 8 --batch-size 64 --workers 2 --checkpoint-seconds 0.2 --draw false"
KEPT = ("records.jsonl", "summary.json", "*.json", "*.log", "*/metrics.csv", "*/record.jsonl", "*/log.jsonl")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), default=ROOT / "build" / "gpu")
    parser.add_argument("--data", default="cifar10", help="CIFAR-10, as `convmixer train` takes it")
    parser.add_argument("--stages", help="A,B: these alone")
    parser.add_argument("--seconds", type=float, default=590, help="of all stages together (default: 590)")
    parser.add_argument("--bundle", type=Path, help="pack all results into this .tar.gz after each stage")
    parser.add_argument("--try", dest="tried", action="store_true", help="tiny sizes, on a CPU: tries this script")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    stages = _stages(options.out, options.data, options.tried)
    chosen = options.stages.split(",") if options.stages else list(stages)
    if unknown := [name for name in chosen if name not in stages]:
        parser.error(f"no such stages: {', '.join(unknown)}; there are {', '.join(stages)}")
    if not options.tried and not _has_card():
        print("there is no CUDA device here: nothing was measured", file=sys.stderr)
        return 2
    summary: dict[str, Any] = {}
    end = time.monotonic() + options.seconds
    for name in chosen:
        command, limit = stages[name]
        summary[name] = _stage(name, command, min(limit, end - time.monotonic()), options.out)
        (options.out / "summary.json").write_text(json.dumps(summary, indent=1))
        found = summary[name]
        print(f"{name:16s} {found['status']:8s} {found['seconds']:5.0f} s  {found['last'][:160]}", flush=True)
        if options.bundle:
            _pack(options.out, options.bundle)
    return int(any(stage["status"] != "done" for stage in summary.values()))


def _has_card() -> bool:
    """Ask in another process: one that holds a context would keep memory from the stages."""
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


def _stages(out: Path, data: str, tried: bool) -> dict[str, tuple[list[str], float]]:
    """Return each stage's command and its time limit in seconds, the most valuable first."""
    python, device = sys.executable, "cpu" if tried else "cuda"
    this, convmixer = [python, str(Path(__file__).resolve())], [python, "-m", "convmixer"]
    cores = min(12, os.cpu_count() or 1)
    # without the project's own pytest settings, which need its test tools
    tests = [python, "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    tests += ["-n", str(cores)] if importlib.util.find_spec("xdist") else []
    own, odd = ([f"tests/test_cuda_{name}.py" for name in names] for names in (("networks", "steps"), ("kernels",)))
    stages: dict[str, tuple[list[str], float]] = {
        "needs": ([*this, "--needs"], 60),
        "compile": ([*this, "--compile", str(out), *(["cpu"] if tried else [])], 150),
        "parity": ([*tests, *own], 120),
    }

    def row(arguments: str) -> list[str]:
        tiny = "--dim 8 --depth 1 --img-size 14 --rounds 1 --sample-seconds 0.01 --no-memory --peers eager-fp32-nchw"
        small = [*tiny.split(), "--precision", "fp32", "--batch-size", "2"] if tried else ["--rounds", "5"]
        record = ["--device", device, "--record", str(out / "records.jsonl"), "--compile-limit", "45"]
        return [*convmixer, "benchmark", *arguments.split(), *record, *small]

    stages |= {name: (row(arguments), limit) for name, (arguments, limit) in TRAIN.items()}
    stages["curves"] = ([python, "-c", CURVES, device, "3" if tried else "300", str(out / "curves.json")], 60)
    stages["resume"] = ([*this, "--resume-check", str(out), device], 90)
    if not tried:
        stages["fits-11-gb"] = ([python, "-c", FITS], 60)
    seeds = {f"cifar10-{seed}": (_train(convmixer, data, out, device, seed, tried), 100) for seed in range(3)}
    stages["cifar10-0"] = seeds["cifar10-0"]
    stages |= {name: (row(arguments), limit) for name, (arguments, limit) in INFER.items()}
    stages |= seeds
    stages["parity-odd"] = ([*tests, *odd, "tests/test_cuda.py"], 150)
    return stages | {name: (row(arguments), limit) for name, (arguments, limit) in AUTOTUNE.items()}


def _train(convmixer: list[str], data: str, out: Path, device: str, seed: int, tried: bool) -> list[str]:
    """Return the command of a run of the authors' recipe; it must end within the stage's time."""
    folder = out / f"cifar10-{seed}-{int(time.time())}"
    command = [*convmixer, "train", data, "--recipe", "authors-cifar10", "--device", device, "--seed", str(seed)]
    command += ["--out", str(folder), "--draw", "false", "--json"]
    tiny = "--model convmixer_8_1_p4_k3 --epochs 1 --batch-size 64"
    return command + (tiny.split() if tried else [])


def _stage(name: str, command: list[str], limit: float, out: Path) -> dict[str, Any]:
    if limit <= 0:
        return {"status": "no time", "seconds": 0.0, "last": ""}
    start = time.monotonic()
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
    path = out / f"{name}.log"
    with path.open("w") as log:
        log.write(f"{shlex.join(command)}\n" if len(shlex.join(command)) < 2000 else "")
        log.flush()
        # in a new session, so that loaders and compilers end with it
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status = "done" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "too long"
        with contextlib.suppress(ProcessLookupError):  # also what a finished stage left running
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines = path.read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return {"status": status, "seconds": time.monotonic() - start, "last": last[:2000]}


def _pack(out: Path, bundle: Path) -> None:
    """Write all results to one file, which is never half written."""
    bundle.parent.mkdir(parents=True, exist_ok=True)
    part = bundle.with_name(f".{bundle.name}.part")
    with tarfile.open(part, "w:gz") as archive:
        for path in sorted({path for pattern in KEPT for path in out.glob(pattern)}):
            archive.add(path, path.relative_to(out))
    part.replace(bundle)


def needs() -> int:
    """Say what is here and what is missing."""
    missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
    print(f"python {sys.version.split()[0]}, {os.cpu_count()} cores, missing: {', '.join(missing) or 'nothing'}")
    for command in (["nvidia-smi"], [sys.executable, "-m", "convmixer", "info"], ["cc", "--version"]):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            print(subprocess.run(command, capture_output=True, text=True, timeout=40).stdout, flush=True)
    print(json.dumps({"missing": missing}))
    return int(bool(missing))


def compile_all(out: Path, device: str) -> int:
    """Fill the caches of Triton and of torch.compile on all cores: everything afterwards starts at once."""
    convmixer = [sys.executable, "-m", "convmixer", "benchmark"]
    commands = {"kernels": [sys.executable, "tools/cuda_resources.py", "--here"]}
    peers = FEW.split(",")[-1]
    for name, (arguments, _) in (TRAIN | INFER).items():
        if name.startswith("train") or name.endswith("-1"):  # other batches compile the same code for other sizes
            words = arguments.split("--peers")[0].split()
            commands[name] = [*convmixer, *words, "--device", "cuda", "--rounds", "0", "--peers", peers]
    if device == "cpu":
        tiny = "train --dim 8 --depth 1 --img-size 14 --precision fp32 --device cpu --rounds 1 --peers none"
        commands = {"tiny": [*convmixer, *tiny.split()]}
    env = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    started = {}
    for name, command in commands.items():
        with (out / f"compile-{name}.log").open("w") as log:
            started[name] = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    failed = [name for name, process in started.items() if process.wait()]
    print(json.dumps({"compiled": len(commands) - len(failed), "failed": failed}))
    return int(bool(failed))


def resume_check(out: Path, device: str) -> int:
    """Train, train again with a SIGKILL in between, and compare the last weights in every bit."""
    from convmixer.models.weights import load_model

    run = RUN.format(model="convmixer_64_4_p1_k5" if device == "cuda" else "convmixer_8_1_p2_k3").split()
    base = [sys.executable, "-m", "convmixer", "train"]
    folders = [out / f"resume-{name}-{int(time.time())}" for name in ("whole", "killed")]
    commands = [[*base, "digits", "--device", device, "--out", str(folder), *run] for folder in folders]
    subprocess.run(commands[0], check=True)
    process = subprocess.Popen(commands[1])
    metrics = folders[1] / "metrics.csv"
    while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 3):
        time.sleep(0.02)
    was_running = process.poll() is None
    process.kill()
    process.wait()
    subprocess.run([*base, "--resume", str(folders[1])], check=True)
    first, second = (load_model(folder / "weights" / "last").model.state_dict() for folder in folders)
    different = [key for key, value in first.items() if not value.equal(second[key])]
    print(json.dumps({"killed_while_running": was_running, "tensors": len(first), "different": different}))
    return int(bool(different) or not was_running)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--resume-check"]:
        sys.exit(resume_check(Path(sys.argv[2]), sys.argv[3]))
    if sys.argv[1:2] == ["--needs"]:
        sys.exit(needs())
    if sys.argv[1:2] == ["--compile"]:
        sys.exit(compile_all(Path(sys.argv[2]), (sys.argv[3:] or ["cuda"])[0]))
    sys.exit(main())
