"""The stages of a run, decided before it begins: which layers are trained, for how long, at which rate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convmixer.config import Config

FROZEN_SHARE = 0.5  # share of a time budget for the stage with frozen layers, if another stage follows


@dataclass(frozen=True)
class Plan:
    """What is trained in a stage of a run, and when.

    Args:
        freeze: The frozen layers, as in the setting `freeze`; None: no layer.
        first: Steps of the run before the stage; with a time budget, their maximum.
        epochs: Length of the stage in epochs; may be a fraction.
        steps: Length of the stage in steps; with a time budget, the maximum. None: only the time ends the stage.
        lr: Peak learning rate.
        until: Share of a time budget at which the stage ends.
    """

    freeze: str | None
    first: int
    epochs: float
    steps: int | None
    lr: float
    until: float = 1.0

    @property
    def end(self) -> int | None:
        """Steps of the run when the stage ends; None: only the time ends it."""
        return None if self.steps is None else self.first + self.steps


def plans_of(config: Config, schedule: Mapping[str, Any]) -> list[Plan]:
    """Return the stages of a run by its settings and its schedule, see `schedule_of`."""
    per_epoch, later = schedule["steps_per_epoch"], config.unfreeze_epochs
    if timed := schedule.get("seconds") is not None:
        epochs, steps = float(config.epochs), config.epochs * per_epoch or None
    else:
        epochs, steps = schedule["epochs"] - later, schedule["steps"] - later * per_epoch
    first = Plan(config.freeze, 0, epochs, steps, config.lr, FROZEN_SHARE if timed and later else 1.0)
    if not later:
        return [first]
    return [first, Plan(None, steps or 0, later, later * per_epoch, config.unfreeze_lr or config.lr / 10)]


def schedule_of(config: Config, steps_per_epoch: int, seconds: float | None) -> dict[str, Any]:
    """Return the length of a run as its settings file holds it: in epochs and steps, or in seconds."""
    if seconds is not None:
        return {"seconds": seconds, "steps_per_epoch": steps_per_epoch}
    epochs = config.epochs + config.unfreeze_epochs
    return {"epochs": float(epochs), "steps": epochs * steps_per_epoch, "steps_per_epoch": steps_per_epoch}
