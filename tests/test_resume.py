"""Stopping and resuming equals never stopping, bit for bit; a kill at any moment leaves something to resume from."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands import Command
from convmixer.config import override
from convmixer.errors import RequestError
from convmixer.models.weights import load_model
from convmixer.recipes import load_recipe
from convmixer.train.checkpoint import LATEST, load_checkpoint, save_checkpoint
from convmixer.train.run import resume, train
from convmixer.train.session import Run
from data_sets import write_noise

EPOCHS, STEPS_PER_EPOCH = 4, 10
# everything that draws random numbers or carries state from step to step
SETTINGS = {
    "model": "convmixer_16_2_p1_k3",
    "epochs": EPOCHS,
    "batch_size": 128,
    "grad_accum": 2,
    "drop_rate": 0.1,
    "mixup": 0.2,
    "cutmix": 0.2,
    "random_erasing": 0.25,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "ema_decay": 0.9,
    "lr": 0.02,
    "checkpoint_seconds": 1e-6,
    "draw": False,
}


def _command(*arguments: str) -> Command:
    return Command("train", *arguments, OMP_NUM_THREADS=str(torch.get_num_threads()))


def _signal_in_mid_epoch(process: Command, run: Path, number: int, checkpoints: int) -> str:
    """Signal the process and its workers, as `timeout` and Ctrl-C do, once that many checkpoints were written.

    Returns what the process has printed.
    """
    latest, seen, last = run / "checkpoints" / LATEST, 0, None
    deadline = time.monotonic() + 120
    while seen < checkpoints and time.monotonic() < deadline and process.poll() is None:
        try:
            now = latest.stat().st_mtime_ns
        except FileNotFoundError:  # not written yet, or just being replaced
            now = None
        seen, last = seen + (now is not None and now != last), now or last
        time.sleep(0.001)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert seen == checkpoints, output
    return output


def test_killed_terminated_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train("digits", override(load_recipe("digits"), SETTINGS | {"workers": 0}), out=whole)

    flags = [item for name, value in SETTINGS.items() for item in ("--" + name.replace("_", "-"), str(value))]
    random_steps = random.Random()
    killed = _command("digits", *flags, "--workers", "2", "--out", str(parts))
    output = _signal_in_mid_epoch(killed, parts, signal.SIGKILL, random_steps.randint(3, 10))
    assert killed.returncode == -signal.SIGKILL, output
    state = load_checkpoint(parts / "checkpoints")
    assert state is not None
    step_killed = state["module"]["steps_done"]

    terminated = _command("--resume", str(parts))
    output = _signal_in_mid_epoch(terminated, parts, signal.SIGTERM, random_steps.randint(3, 10))
    assert terminated.returncode == 143, output
    assert f"resuming {parts} at step {step_killed} of {EPOCHS * STEPS_PER_EPOCH}" in output.replace("\n", "")
    assert "continue with: convmixer train --resume" in output
    state = load_checkpoint(parts / "checkpoints")
    assert state is not None
    assert step_killed < state["module"]["steps_done"] < EPOCHS * STEPS_PER_EPOCH

    assert resume(parts)["epochs"] == EPOCHS
    for which in ("best", "last"):
        expected, found = (load_file(run / "weights" / which / "model.safetensors") for run in (whole, parts))
        assert all(torch.equal(expected[key], found[key]) for key in expected), which
    rows = [
        [line.split(",")[:7] for line in (run / "metrics.csv").read_text().splitlines()] for run in (whole, parts)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == EPOCHS + 1
    events = (parts / "log.jsonl").read_text()
    assert events.count('"event": "epoch"') == EPOCHS
    assert events.count('"event": "resume"') == 2


def test_the_weights_it_began_from_may_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model": "convmixer_8_1_p1_k3", "epochs": 2, "workers": 0, "draw": False}
    train("digits", override(load_recipe("digits"), settings | {"mean": "0.4", "std": "0.2"}), out=tmp_path / "start")
    from_start = override(load_recipe("digits"), settings | {"model": "auto", "weights": str(tmp_path / "start")})
    whole = train("digits", from_start, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_finish", lambda run: 1 / 0)  # dies after its last checkpoint
        with pytest.raises(ZeroDivisionError):
            train("digits", from_start, out=tmp_path / "parts")
    shutil.rmtree(tmp_path / "start")
    assert resume(tmp_path / "parts")["test_top1"] == whole["test_top1"]
    assert load_model(tmp_path / "parts").preprocessing.mean == (0.4,)


def test_a_kill_while_writing_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    script = f"""
import torch
from pathlib import Path
from convmixer.recipes import load_recipe
from convmixer.train.checkpoint import save_checkpoint
for step in range(10**6):
    save_checkpoint(Path({str(tmp_path)!r}), {{"step": step, "values": torch.full((1_000_000,), float(step))}})
"""
    writer = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while not (tmp_path / "previous.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.1))
    writer.kill()
    writer.wait()
    state = load_checkpoint(tmp_path)
    assert state is not None
    assert torch.equal(state["values"], torch.full((1_000_000,), float(state["step"])))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, {"step": 1})
    save_checkpoint(tmp_path, {"step": 2})
    assert load_checkpoint(tmp_path) == {"step": 2}
    latest = tmp_path / LATEST
    latest.write_bytes(latest.read_bytes()[:100])
    assert load_checkpoint(tmp_path) == {"step": 1}
    (tmp_path / "previous.pt").write_bytes(b"nothing")
    with pytest.raises(RequestError, match="can be read"):
        load_checkpoint(tmp_path)


def test_an_unwritable_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(tmp_path, {"step": 2, "bad": lambda: None})
    assert load_checkpoint(tmp_path) == {"step": 1}


def test_unreadable_images_that_stopped_a_run_can_be_allowed(tmp_path: Path) -> None:
    """Damage behind a good header shows only while training; the run's other settings and images stay."""
    write_noise(tmp_path / "data")
    for i in range(10):
        file = tmp_path / "data" / "a" / f"{i}.png"
        file.write_bytes(file.read_bytes()[:200])
    tiny = {"model": "convmixer_16_1_p4_k3", "epochs": 1, "batch_size": 8, "draw": False}
    config = override(load_recipe("finetune"), tiny)
    with pytest.raises(RequestError, match="of 40 images cannot be used"):
        train(str(tmp_path / "data"), config, out=tmp_path / "run")
    assert resume(tmp_path / "run", max_bad_fraction=0.5)["epochs"] == 1
    assert "max_bad_fraction: 0.5" in (tmp_path / "run" / "config.yaml").read_text()
