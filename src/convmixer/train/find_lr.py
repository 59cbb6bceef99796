"""Finds a learning rate: takes steps with rates that grow from tiny to huge, and draws the loss against the rate.

The model starts from the run's starting weights and is trained with the run's settings, except for the rate. The
trained model is not kept.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from convmixer import records
from convmixer.config import Config
from convmixer.errors import RequestError
from convmixer.files import write_atomic
from convmixer.results import plots
from convmixer.run_folder import RATES, RATES_PICTURE
from convmixer.text import terminal
from convmixer.train import features
from convmixer.train.distributed import world_size
from convmixer.train.engine import fit
from convmixer.train.folder import RunFiles, check_empty
from convmixer.train.freeze import ALL
from convmixer.train.plans import Plan
from convmixer.train.progress import Progress
from convmixer.train.setup import Job, prepare
from convmixer.train.stages import Stage

LOWEST, HIGHEST, STEPS = 1e-7, 10.0, 100
DIVERGED = 4.0  # the test ends when the smoothed loss is this many times its minimum
FORGETTING = 0.9  # decay per step of the running mean that is compared with DIVERGED
WIDTH = 3.0  # standard deviation, in steps, of the Gaussian that smooths the drawn loss
LEAST_FALL = 0.02  # share by which the loss must fall; less may be chance


def find_lr(data: str, config: Config, out: Path | None = None, name: str = "lr") -> dict[str, Any]:
    """Draw how the loss depends on the learning rate, and return the rate at which it falls most steeply.

    Args:
        data: The data argument.
        config: Resolved settings; `lr`, `schedule` and the length of the run do not matter.
        out: New or empty folder; None: the next free `runs/<name>-<number>`.
        name: Name in the path of that folder.

    Returns:
        `run` (the folder), `lr` (None if the loss does not fall at any rate), `lowest_at` (the rate with the lowest
        loss) and `steps`.

    Raises:
        RequestError: The settings, the data or the folder cannot be used, or several processes were started.

    Source: arXiv 1506.01186, Sec. 3.3 (the range test); a geometric ramp and the steepest fall as in fastai.
    """
    if world_size() > 1:
        raise RequestError("find-lr runs in one process: start it without torchrun")
    if out is not None:
        check_empty(out)
    job, console = prepare(data, config), Console(soft_wrap=True, highlight=False, markup=False)
    folder = RunFiles.create(out, name).path
    rates, losses = _ramp(job, console)
    smoothed = smooth(losses)
    lr, lowest = suggest(rates, smoothed), float(rates[int(np.argmin(smoothed))])
    found = {"lr": lr, "lowest_at": lowest, "steps": len(losses)}
    table = {"rates": rates.tolist(), "losses": losses.tolist(), "smoothed": smoothed.tolist()}
    about = {"command": records.command_line(), "model": job.build[0], "batch_size": job.batch_size}
    write_atomic(folder / RATES, json.dumps(about | found | table, indent=1).encode())
    plots.learning_rates(rates, losses, smoothed, lr, folder / RATES_PICTURE)
    _say(console, job, found, folder)
    return {"run": str(folder)} | found


def _ramp(job: Job, console: Console) -> tuple[np.ndarray, np.ndarray]:
    """Return the rates of the steps that were taken, and their losses, all finite."""
    on_features = job.config.freeze == ALL and not features.why_not(job)
    plan = Plan(job.config.freeze, 0, 1.0, STEPS, job.config.lr)
    stage = Stage(job, plan, features.compute(job) if on_features else None)
    module, rates = stage.module, np.geomspace(LOWEST, HIGHEST, STEPS)
    factor = module.config.lr / job.config.lr  # 1, unless AdamW trains a classifier in place of Muon
    ramp = [
        dataclasses.replace(module.config, lr=float(rate) * factor, schedule="constant", patience=0) for rate in rates
    ]
    losses: list[float] = []
    mean, smallest, total = 0.0, math.inf, 0.0

    def after_step() -> bool:
        nonlocal mean, smallest, total
        loss, total = float(module.loss_sum) - total, float(module.loss_sum)
        if not math.isfinite(loss):
            return True
        losses.append(loss)
        bar.update(len(losses), len(losses) / STEPS)
        module.config = ramp[min(len(losses), STEPS - 1)]
        mean = FORGETTING * mean + (1 - FORGETTING) * loss
        current = mean / (1 - FORGETTING ** len(losses))
        smallest = min(smallest, current)
        return current > DIVERGED * smallest

    module.config = ramp[0]
    try:
        with Progress(console, job.batch_size) as bar:
            fit(module, stage.train_loader(), STEPS, after_step)
    finally:
        stage.close()
    if not losses:
        raise FloatingPointError(f"the loss is not finite at the first step, with a learning rate of {LOWEST:g}")
    return rates[: len(losses)], np.array(losses)


def smooth(losses: np.ndarray) -> np.ndarray:
    """Return the losses (N,) smoothed with a Gaussian."""
    places = np.arange(len(losses))
    weights = np.exp(-0.5 * ((places[:, None] - places) / WIDTH) ** 2)
    mean: np.ndarray = weights @ losses / weights.sum(1)
    return mean


def suggest(rates: np.ndarray, smoothed: np.ndarray) -> float | None:
    """Return, to two digits, the rate at which the loss falls most steeply over log(rate) before its minimum.

    Args:
        rates: Learning rates in increasing order, (N,).
        smoothed: The smoothed loss at each rate, (N,).

    Returns:
        The rate, or None if the loss does not fall.
    """
    lowest = int(np.argmin(smoothed))
    if lowest == 0 or smoothed[0] - smoothed[lowest] < LEAST_FALL * abs(smoothed[0]):
        return None
    slopes = np.gradient(smoothed, np.log(rates))[: lowest + 1]
    return float(f"{rates[int(np.argmin(slopes))]:.1e}")


def _say(console: Console, job: Job, found: dict[str, Any], folder: Path) -> None:
    ended = "" if found["steps"] == STEPS else ": at higher rates the loss diverges"
    console.print(f"steps    {found['steps']} of {STEPS} at batch {job.batch_size}, {job.build[0]}{ended}")
    if found["lr"] is None:
        console.print("rate     the loss falls at no rate: more images per batch, or other settings, may show more")
    else:
        lowest = f"{found['lowest_at']:.2g}"
        console.print(f"rate     --lr {found['lr']:g}: there the loss falls most steeply; it is lowest at {lowest}")
    console.print(f"files    {terminal(folder / RATES_PICTURE)}, {terminal(folder / RATES)}; the model was not kept")
