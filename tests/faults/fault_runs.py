"""A tiny run to break, and a table of tries and failures."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from commands import Command
from convmixer.config import Config, override
from convmixer.recipes import load_recipe
from convmixer.run_folder import BEST, LAST, MODEL, RunFolder

EPOCHS, STEPS_PER_EPOCH = 3, 5
# everything that draws random numbers or carries state from step to step
SETTINGS = {
    "model": "convmixer_8_1_p2_k3",
    "epochs": EPOCHS,
    "batch_size": 256,
    "workers": 0,
    "drop_rate": 0.1,
    "mixup": 0.2,
    "random_erasing": 0.25,
    "ema_decay": 0.9,
    "lr": 0.02,
    "checkpoint_seconds": 1e-6,
}


def settings(draw: bool = False) -> Config:
    """Return the settings of the tiny run."""
    return override(load_recipe("digits"), SETTINGS | {"draw": draw})


def start(*arguments: str) -> Command:
    """Start `convmixer train` with as many threads as here, in its own process group."""
    return Command("train", *arguments, OMP_NUM_THREADS=str(torch.get_num_threads()))


def flags() -> list[str]:
    """Return the settings as flags."""
    return [item for name, value in SETTINGS.items() for item in ("--" + name.replace("_", "-"), str(value))]


def differences(whole: Path, other: Path) -> list[str]:
    """Return how a run differs from the undisturbed one: weights bit for bit, rows except for times."""
    found = []
    for which in (BEST, LAST):
        expected, there = (load_file(RunFolder(run).weights(which) / MODEL) for run in (whole, other))
        if not all(torch.equal(expected[key], there[key]) for key in expected):
            found.append(f"{which} weights differ")
    rows = [
        [line.split(",")[:7] for line in RunFolder(run).metrics.read_text().splitlines()] for run in (whole, other)
    ]
    if rows[0] != rows[1]:
        found.append("rows of metrics.csv differ")
    leftovers = [path.name for path in other.rglob(".*.tmp")]
    return found + [f"left behind: {name}" for name in leftovers]


def report(what: str, tries: Sequence[object], attempt: Callable[[object], str | None]) -> None:
    """Make all tries, print the row, and fail if any try failed; an attempt returns what went wrong, or None."""
    failures = [f"{number}: {failure}" for number in tries if (failure := attempt(number))]
    print(f"{what}: {len(tries)} tries, {len(failures)} failures")
    assert not failures, "\n".join(failures)
