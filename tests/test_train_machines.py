"""Two machines train as one; a pulled cable and a machine that vanishes lose at most the steps since a checkpoint."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from convmixer.run_folder import LAST, LATEST, MODEL, RunFolder
from machines import Machine, torchrun, two_machines, why_not
from test_train_processes import ARGUMENTS, ENVIRONMENT, run

pytestmark = pytest.mark.slow


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    if reason := why_not():
        pytest.skip(reason)
    with two_machines() as found:
        yield found


def start(
    machine: Machine, out: Path, *more: str, nodes: str = "2", restarts: int = 0, hidden: Path | None = None
) -> "subprocess.Popen[str]":
    command = [*torchrun(machine, nodes, restarts), "-m", "convmixer", *ARGUMENTS, *more, "--out", str(out)]
    return machine.start(command, ENVIRONMENT, hidden)


def wait_for_steps(run: Path, count: int, seconds: float = 120) -> None:
    """Wait until a run has written so many checkpoints."""
    latest, seen, deadline = RunFolder(run).checkpoints / LATEST, set[int](), time.monotonic() + seconds
    while len(seen) < count:
        assert time.monotonic() < deadline
        try:
            seen.add(latest.stat().st_mtime_ns)
        except OSError:
            time.sleep(0.001)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(RunFolder(run).weights(LAST) / MODEL)


def assert_equal(found: Path, expected: Path) -> None:
    """Assert that weights are equal within the tolerance stated for several processes."""
    one, other = weights(expected), weights(found)
    for key in one:
        torch.testing.assert_close(other[key], one[key], rtol=1e-3, atol=2e-4)


def test_two_machines_equal_one_process(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    """The second machine sees nothing of the run folder."""
    alone = run(tmp_path / "alone", ())
    out = tmp_path / "shared" / "two"
    out.parent.mkdir()
    first = start(machines[0], out)
    second = start(machines[1], out, hidden=out.parent)
    for process in (first, second):
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    assert_equal(out, alone)
    assert json.loads(RunFolder(out).record.read_text())["results"]["processes"] == 2


LONG = ("--epochs", "30", "--checkpoint-seconds", "1e-6", "--sync-bn", "false")


def test_a_cable_pulled_for_20_seconds_changes_nothing(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "cut"
    processes = [start(machine, whole, *LONG) for machine in machines]
    assert [process.wait(240) for process in processes] == [0, 0]
    processes = [start(machine, out, *LONG) for machine in machines]
    wait_for_steps(out, 20)
    machines[1].pull()
    time.sleep(20)
    machines[1].plug()
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        assert "resuming" not in output
    expected, found = weights(whole), weights(out)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
