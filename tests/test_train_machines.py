"""Two machines train as one; a pulled cable and a machine that vanishes lose at most the steps since a checkpoint."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from convmixer.run_folder import LAST, LATEST, MODEL, RunFolder
from convmixer.train.checkpoint import load_checkpoint
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


def step_of(run: Path) -> int:
    """Return the step of the checkpoint that a resumed run begins from."""
    state = load_checkpoint(RunFolder(run).checkpoints)
    assert state is not None
    return int(state["module"]["steps_done"])


def resumed_at(output: str) -> int:
    found = re.search(r"resuming .* at step (\d+) of 300", output)
    assert found, output
    return int(found[1])


def test_without_one_machine_the_other_goes_on(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    """`--nnodes 1:2 --max-restarts 2`: it continues from the last checkpoint on its own."""
    out = tmp_path / "run"
    more = (*LONG, "--process-timeout", "15")
    processes = [start(machine, out, *more, nodes="1:2", restarts=2) for machine in machines]
    wait_for_steps(out, 20)
    machines[1].die()
    output, _ = processes[0].communicate(timeout=240)
    assert processes[0].returncode == 0, output
    assert re.search(r"process 0 on \S+ lost the connection to another process", output), output
    assert resumed_at(output) >= 20
    assert json.loads(RunFolder(out).record.read_text())["results"]["processes"] == 1


@pytest.mark.parametrize("kept", [0, 1])
def test_a_lost_machine_ends_the_other_and_no_checkpoint(
    machines: tuple[Machine, Machine], tmp_path: Path, kept: int
) -> None:
    """If the first one is lost, torchrun on the second waits for its store as long as Linux lets it."""
    out = tmp_path / "run"
    machines[1].give_up_soon()
    processes = [start(machine, out, *LONG, "--process-timeout", "15") for machine in machines]
    wait_for_steps(out, 20)
    machines[1 - kept].die()
    output, _ = processes[kept].communicate(timeout=240)
    assert processes[kept].returncode == 1, output
    lines = [line for line in output.splitlines() if line.startswith("convmixer train:")]
    assert len(lines) == 1 or kept == 1, output
    assert all(
        re.search(r"process \d on \S+ lost the connection to another process .*continue with --resume", line)
        for line in lines
    )
    step = step_of(out)
    assert step >= 20
    command = [sys.executable, "-m", "convmixer", "train", "--resume", str(out)]
    again = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert resumed_at(again.stdout) == step


def test_a_killed_process_restarts_those_of_all_machines(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    """torchrun counts the restart on one machine alone, and its store holds addresses of the dead."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    processes = [start(machine, whole, *LONG) for machine in machines]
    assert [process.wait(240) for process in processes] == [0, 0]
    processes = [start(machine, out, *LONG, restarts=2) for machine in machines]
    wait_for_steps(out, 20)
    machines[1].kill_one()
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert resumed_at("".join(outputs)) >= 20
    expected, found = weights(whole), weights(out)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
