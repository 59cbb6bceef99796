"""Several processes on gloo are one process with the same global batch, also after one of them died."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands import Command
from convmixer.run_folder import LAST, LATEST, MODEL, RunFolder
from data_sets import write_folder

ARGUMENTS = [
    *("train", "digits", "--model", "convmixer_16_2_p1_k3", "--epochs", "2", "--batch-size", "128", "--lr", "0.01"),
    *("--workers", "0", "--precision", "fp32", "--ema-decay", "0.5", "--sync-bn", "true", "--val-fraction", "0.07"),
]
# plain PyTorch in the single process too: what is compared is the processes, not the kernels
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CONVMIXER_KERNELS": "0"}


def torchrun(processes: int, *more: str) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--nproc-per-node", str(processes), *more)


def start(out: Path, launcher: tuple[str, ...], *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, *launcher, "-m", "convmixer", *ARGUMENTS, *more, "--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, text=True, start_new_session=True, **pipes)


def run(out: Path, launcher: tuple[str, ...], *more: str) -> Path:
    process = start(out, launcher, *more)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return out


def weights(run: Path, which: str = LAST) -> dict[str, torch.Tensor]:
    return load_file(RunFolder(run).weights(which) / MODEL)


def results(run: Path) -> dict:
    return json.loads(RunFolder(run).record.read_text())["results"]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("processes") / "one"
    Command(*ARGUMENTS, "--out", str(out), **ENVIRONMENT).finish(240)
    return out


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_equal_one_with_the_same_global_batch(one: Path, tmp_path: Path, processes: int) -> None:
    several = run(tmp_path / "several", torchrun(processes))
    assert all("of 360 images are misclassified" in (path / "mistakes.html").read_text() for path in (one, several))
    # Sums over parts of batches, then over processes, round differently; over 20 fp32 steps that grew to 8e-6.
    # With BatchNorm statistics of one process's part, or gradients not averaged, weights differ by 1e-2 and more.
    expected, found = weights(one), weights(several)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=2e-4)
    rows = [RunFolder(path).metrics.read_text().splitlines()[1:] for path in (one, several)]
    numbers = [[[float(cell) for cell in row.split(",")[:7]] for row in table] for table in rows]
    torch.testing.assert_close(torch.tensor(numbers[1]), torch.tensor(numbers[0]), rtol=1e-3, atol=1e-3)
    events = [json.loads(line)["event"] for line in RunFolder(several).log_file.read_text().splitlines()]
    assert events == ["start", "epoch", "epoch", "end"]  # written by one process alone
    # every image counts once; two processes cannot share 101 evenly
    assert [[results(path)[f"{split}_n"] for split in ("val", "test")] for path in (one, several)] == [[101, 360]] * 2


@pytest.mark.slow
def test_three_processes_count_every_image_once(one: Path, tmp_path: Path) -> None:
    """101 and 360 images, which three processes cannot share evenly."""
    three = results(run(tmp_path / "three", torchrun(3), "--batch-size", "96", "--epochs", "1", "--draw", "false"))
    alone = results(one)
    assert [three["val_n"], three["test_n"]] == [alone["val_n"], alone["test_n"]] == [101, 360]


@pytest.mark.slow
def test_statistics_are_the_mean_over_processes(tmp_path: Path) -> None:
    """Also in the moving average, for which those of only the first process would be wrong."""
    one_step = ("--sync-bn", "false", "--batch-size", "1024", "--epochs", "1", "--lr", "1e-9", "--draw", "false")
    single = weights(run(tmp_path / "one", (), *one_step))
    double = weights(run(tmp_path / "two", torchrun(2), *one_step))
    key = "stem.2.running_mean"
    # the mean of both halves' means is that of all; one half's alone is 3e-5 away
    torch.testing.assert_close(double[key], single[key], rtol=0, atol=1e-6)


def workers_of(agent: int) -> list[int]:
    """Return the processes that torchrun started."""
    found = Path(f"/proc/{agent}/task/{agent}/children")
    return [int(number) for number in found.read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_restarted_and_the_result_is_the_same(tmp_path: Path, victim: int) -> None:
    """torchrun starts the group again; statistics and the moving average are those of all processes."""
    settings = ("--sync-bn", "false", "--epochs", "4", "--mixup", "0.2", "--draw", "false", "--logger", "none")
    whole = run(tmp_path / "whole", torchrun(2), *settings)
    disturbed = tmp_path / "disturbed"
    launcher = torchrun(2, "--max-restarts", "2")
    process = start(disturbed, launcher, *settings, "--checkpoint-seconds", "1e-6")  # one each step
    latest, seen, deadline = RunFolder(disturbed).checkpoints / LATEST, set[int](), time.monotonic() + 120
    while len(seen) < 15 and time.monotonic() < deadline and process.poll() is None:  # in mid-epoch
        try:
            seen.add(latest.stat().st_mtime_ns)
        except OSError:  # not written yet, or being replaced
            time.sleep(0.001)
    os.kill(workers_of(process.pid)[victim], signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "resuming" in output, output
    expected, found = weights(whole), weights(disturbed)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("second", ["other", "missing"])
def test_processes_with_other_data_are_refused(tmp_path: Path, second: str) -> None:
    """As if the machines of two processes had different files with the same name."""
    folders = [write_folder(tmp_path / "0", range(200)), tmp_path / "1"]
    if second == "other":
        write_folder(folders[1], range(1, 201))
    script = (
        f"exec {sys.executable} -m convmixer train {tmp_path}/$RANK {' '.join(ARGUMENTS[2:])} --out {tmp_path}/run"
    )
    command = [sys.executable, *torchrun(2), "--no-python", "sh", "-c", script]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    said = {line for line in done.stderr.splitlines() if line.startswith("convmixer train:")}
    expected = "the processes differ in data: " if second == "other" else r"no data .*\(process 1 on \S+\)"
    assert any(re.search(expected, line) for line in said), done.stderr
    assert not (tmp_path / "run").exists()
