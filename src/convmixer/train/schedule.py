"""Learning rate as a pure function of the time in epochs, so that no scheduler state exists to save or lose."""

import math
from collections.abc import Sequence

import numpy as np

from convmixer.errors import unknown

SCHEDULES = ("piecewise", "cosine", "constant")


def learning_rate(schedule: str, epoch: float, epochs: float, peak: float) -> float:
    """Return the learning rate at a time of the run.

    Step i of n in epoch e (both counted from 0) is taken at `epoch = e + (i + 1) / n`, as in the authors' CIFAR-10
    script. So the first step has a rate above 0, and the last one has exactly 0 with "piecewise" and "cosine".

    Args:
        schedule: "piecewise" (the paper's), "cosine" or "constant". The first two rise in the same way over the first
            two fifths of the run; then "cosine" falls to 0 as half a cosine.
        epoch: Time since the start in epochs, 0 to `epochs`.
        epochs: Length of the run in epochs, above 0; it may be a fraction if there is a time budget.
        peak: Highest learning rate.

    Raises:
        RequestError: The schedule is not known.

    Source: piecewise: github.com/locuslab/convmixer-cifar10, train.py, `lr_schedule`; the others: ours.
    """
    if schedule == "constant":
        return peak
    times = knots(epochs)
    if schedule == "piecewise":
        return float(np.interp(epoch, times, (0.0, peak, peak / 20, 0.0)))
    if schedule == "cosine":
        warm = times[1]
        if epoch < warm:
            return peak * epoch / warm
        return peak * (1 + math.cos(math.pi * min(1.0, (epoch - warm) / (epochs - warm)))) / 2
    raise unknown("schedule", schedule, SCHEDULES)


def knots(epochs: float) -> Sequence[float]:
    """Return the four times, in epochs, between which the piecewise schedule is linear.

    For T epochs they are 0, 2T//5, 4T//5 and T, as in the authors' script. If T is below 3 or not whole, two of these
    would be equal or out of proportion, so 0.4 T and 0.8 T are used instead.
    """
    if epochs >= 3 and float(epochs).is_integer():
        whole = int(epochs)
        return 0, 2 * whole // 5, 4 * whole // 5, whole
    return 0, 0.4 * epochs, 0.8 * epochs, epochs


def rate_at_step(schedule: str, step: int, steps_per_epoch: int, epochs: float, peak: float) -> float:
    """Return the learning rate of an optimizer step, counted from 0 over the whole run."""
    epoch, inside = divmod(step, steps_per_epoch)
    return learning_rate(schedule, epoch + (inside + 1) / steps_per_epoch, epochs, peak)
