"""Two processes on gloo are one process with the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ARGUMENTS = [
    *("train", "digits", "--model", "convmixer_16_2_p1_k3", "--epochs", "2", "--batch-size", "128", "--lr", "0.01"),
    *("--workers", "1", "--precision", "fp32", "--ema-decay", "0.5", "--sync-bn", "true"),
]
TWO = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


def _run(out: Path, launcher: tuple[str, ...], *more: str) -> Path:
    command = [sys.executable, *launcher, "-m", "convmixer", *ARGUMENTS, *more, "--out", str(out)]
    # plain PyTorch in the single process too: what is compared is the processes, not the kernels
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CONVMIXER_KERNELS": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_two_processes_equal_one_with_the_same_global_batch(tmp_path: Path) -> None:
    one, two = _run(tmp_path / "one", ()), _run(tmp_path / "two", TWO)
    # Sums over half batches, then over processes, round differently; over 20 fp32 steps that grew to 8e-6.
    # With BatchNorm statistics of one process's half, or gradients not averaged, weights differ by 1e-2 and more.
    expected, found = (load_file(run / "weights" / "last" / "model.safetensors") for run in (one, two))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=2e-4)
    rows = [(run / "metrics.csv").read_text().splitlines()[1:] for run in (one, two)]
    numbers = [[[float(cell) for cell in row.split(",")[:7]] for row in table] for table in rows]
    torch.testing.assert_close(torch.tensor(numbers[1]), torch.tensor(numbers[0]), rtol=1e-3, atol=1e-3)
    assert len((two / "log.jsonl").read_text().splitlines()) == 4  # written by one process alone


def test_statistics_are_the_mean_over_processes(tmp_path: Path) -> None:
    one_step = ("--sync-bn", "false", "--ema-decay", "0", "--batch-size", "1024", "--epochs", "1", "--lr", "1e-9")
    one, two = _run(tmp_path / "one", (), *one_step), _run(tmp_path / "two", TWO, *one_step)
    expected, found = (load_file(run / "weights" / "last" / "model.safetensors") for run in (one, two))
    assert expected["stem.2.num_batches_tracked"] == found["stem.2.num_batches_tracked"] == 1
    # the mean of both halves' means is that of all; one half's alone is 3e-5 away
    key = "stem.2.running_mean"
    torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-6)
