"""Collects loss, learning rate and speed every few steps: about 500 rows for a run of any length."""

import time
from typing import Any

import torch

MOST_ROWS = 500
WAIT_EVERY = 20  # steps on a GPU between two readings of the loss, because each reading waits for the GPU


class StepRows:
    """Collects a row for every few steps, and one at the end of each epoch.

    Args:
        batch_size: Images per step.
        device: The device on which the losses are summed.

    Attributes:
        rows: Dicts of step, train_loss, lr and images_per_second. train_loss is the mean over the steps since the row
            before, in the first process.
    """

    def __init__(self, batch_size: int, device: torch.device | None = None) -> None:
        self.least = WAIT_EVERY if device and device.type == "cuda" else 1
        self.batch_size = batch_size
        self.rows: list[dict[str, Any]] = []
        self._seen, self._sum, self._part = 0, 0.0, 0  # step, sum of losses and part of the run at the last row
        self.restart_clock()

    def new_epoch(self) -> None:
        """Reset the sum of losses to 0, and do not count the time between epochs."""
        self._sum = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Do not count the time since the last row."""
        self._began, self._from = time.perf_counter(), -1

    def add(self, step: int, loss_sum: torch.Tensor, rate: Any, done: float, ends_epoch: bool) -> None:
        """Record a finished step.

        Args:
            step: Its number, from 1.
            loss_sum: Sum of the losses of the epoch's steps so far.
            rate: Its learning rate, a number or a tensor.
            done: How far the run is, 0 to 1.
            ends_epoch: Whether the next step is of a new epoch.
        """
        if self._from < 0:
            self._from = step - 1
        few = step - self._seen < self.least or int(done * MOST_ROWS + 1e-9) == self._part
        if few and not ends_epoch:
            return
        self._part = int(done * MOST_ROWS + 1e-9)
        total = float(loss_sum)
        mean = (total - self._sum) / (step - self._seen)
        speed = (step - self._from) * self.batch_size / max(time.perf_counter() - self._began, 1e-9)
        self.rows.append({"step": step, "train_loss": mean, "lr": float(rate), "images_per_second": speed})
        self._seen, self._sum = step, total
        self.restart_clock()

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"rows": self.rows, "seen": self._seen, "sum": self._sum, "part": self._part}

    def restore(self, state: dict[str, Any] | None, step: int) -> None:
        """Go back to a state that `state` returned at a step; None (from an older version) means no rows."""
        state = state or {"rows": [], "seen": step, "sum": 0.0}
        self.rows, self._seen, self._sum = list(state["rows"]), state["seen"], state["sum"]
        self._part = state.get("part", 0)
        self.restart_clock()
