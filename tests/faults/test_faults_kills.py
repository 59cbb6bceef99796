"""A run killed at any moment and resumed ends like an uninterrupted one, bit for bit."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_runs import differences, flags, start

from commands import Command
from convmixer.run_folder import LATEST, RunFolder
from convmixer.train.folder import RunFiles
from convmixer.train.run import resume


def after(seconds: float) -> Callable[[Path], bool]:
    """Return a question that is true some time after it was first asked."""
    deadline: list[float] = []

    def asked(run: Path) -> bool:
        deadline.append(time.monotonic() + seconds)
        return time.monotonic() > deadline[0]

    return asked


def checkpoints(count: int) -> Callable[[Path], bool]:
    """Return a question that is true once that many checkpoints were written since it was first asked."""
    seen: list[int] = []

    def asked(run: Path) -> bool:
        try:
            now = (RunFolder(run).checkpoints / LATEST).stat().st_mtime_ns
        except OSError:  # not written yet, or being replaced
            return False
        if not seen or seen[-1] != now:
            seen.append(now)
        return len(seen) > count

    return asked


def writing(name: str) -> Callable[[Path], bool]:
    """Return a question that is true while a file of that name is being written, anywhere in the run."""
    return lambda run: any(True for _ in run.rglob(f".{name}.*.tmp"))


def exists(name: str) -> Callable[[Path], bool]:
    """Return a question that is true once a file is there."""
    return lambda run: (run / name).exists()


def moments(random_: random.Random, count: int) -> list[tuple[str, Callable[[Path], bool]]]:
    """Return moments to kill at: while starting or resuming, between steps, while writing, while finishing."""
    kinds: list[Callable[[], tuple[str, Callable[[Path], bool]]]] = [
        lambda: ("starting or resuming", after(random_.uniform(0, 2))),
        lambda: ("between steps", checkpoints(random_.randint(1, 6))),
        lambda: ("writing a checkpoint", writing(LATEST)),
        lambda: ("writing weights", writing("model.safetensors")),
        lambda: ("writing metrics", writing("metrics.csv")),
        lambda: ("finishing", exists("pictures/curves.png")),
        lambda: ("finishing", exists("README.md")),
    ]
    return [kinds[number % len(kinds)]() for number in range(count)]


def kill_at(process: Command, run: Path, reached: Callable[[Path], bool]) -> str:
    """Kill a process group at a moment; return what it printed if it ended otherwise, in error."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if reached(run):
                break
        except OSError:  # a file was replaced just now
            continue
        time.sleep(0.0005)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    return "" if process.returncode in (0, -signal.SIGKILL) else output


def run_with_kills(whole: Path, run: Path, kills: int, seed: int) -> list[str]:
    """Return what went wrong in a run that was killed that often; a finished one is begun anew elsewhere."""
    failures, number = [], 0
    draw = ["--draw", str(kills > 5).lower()]  # fewer kills do not reach the pictures
    for number, (name, reached) in enumerate(moments(random.Random(seed), kills)):
        begun = RunFolder(run).config.exists()
        words = ["--resume", str(run)] if begun else ["digits", *flags(), *draw, "--out", str(run)]
        process = start(*words)
        if output := kill_at(process, run, reached):
            failures.append(f"kill {number} while {name}: {output}")
        if RunFiles(run).record.exists():  # too late for this one: it counts, and the next run begins
            failures += differences(whole, run)
            run = run.with_name(f"{run.name}x")
    if RunFolder(run).config.exists():
        resume(run)
        failures += differences(whole, run)
    print(f"kills at random moments: {number + 1} tries, {len(failures)} failures")
    return failures


def test_a_few_kills_change_nothing(whole: Path, tmp_path: Path) -> None:
    assert run_with_kills(whole, tmp_path / "run", kills=3, seed=random.randrange(10**9)) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills_change_nothing(whole: Path, tmp_path: Path) -> None:
    assert run_with_kills(whole, tmp_path / "run", kills=50, seed=random.randrange(10**9)) == []


def test_sigterm_to_the_trainer_and_its_workers_exits_143(tmp_path: Path) -> None:
    """As systemd and SLURM do; it must not become an error if a worker ends first."""
    run = tmp_path / "run"
    process = start("digits", *flags(), "--draw", "false", "--workers", "2", "--epochs", "200", "--out", str(run))
    reached = checkpoints(random.randint(3, 20))
    deadline = time.monotonic() + 120
    while not reached(run) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "continue with: convmixer train --resume" in output


def test_a_second_process_is_refused_and_the_first_goes_on(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start("digits", *flags(), "--draw", "false", "--out", str(run))
    while not RunFolder(run).lock.exists() and first.poll() is None:
        time.sleep(0.001)
    while not RunFolder(run).config.exists() and first.poll() is None:
        time.sleep(0.001)
    os.killpg(first.pid, signal.SIGSTOP)
    second = start("--resume", str(run))
    output, _ = second.communicate(timeout=120)
    os.killpg(first.pid, signal.SIGCONT)
    assert second.returncode == 2, output
    assert f"is in use by process {first.pid} on " in output.replace("\n", " ")
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0, output
    assert differences(whole, run) == []
