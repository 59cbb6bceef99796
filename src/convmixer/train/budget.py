"""Keeps a time budget: which share of it is used at each step, and when the last step must end.

The learning rate is a function of the share. Each step's share is on disk before the step is taken, so a killed run
repeats its steps with the same learning rates. After the last step the run still evaluates, writes weights and draws.
The time for this is estimated from how long evaluation took earlier in the run, and from how much slower or faster
the machine is now than at the start. A small fixed task, the gauge, measures that from time to time.
"""

import statistics
import struct
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from convmixer.train.distributed import from_first, rank, world_size
from convmixer.train.module import TrainingModule, autocast
from convmixer.train.plans import Plan
from convmixer.train.scores import score
from convmixer.train.setup import Job

GAUGE_EVERY = 0.02  # share of the budget between two runs of the gauge
GAUGE_IMAGES, GAUGE_SECONDS = 16, 0.05
GAUGE_SHARE = 1e-4  # share of the budget for a run of the gauge, if that is more than GAUGE_SECONDS
PROBED_SHARE, PROBED_SECONDS = 0.01, 1.0  # of the budget, at least: for measuring how long evaluating a split takes
PROBED_IMAGES = 512
SLACK = 1.1  # factor on the estimate of the time reserved for the end
_OVER = -1.0  # instead of a share: the training ended here
_ENTRY = struct.Struct("<dd")  # share of the budget, seconds since the run began


class Budget:
    """The time of a run, and how much of it each step has used.

    Args:
        seconds: The whole budget, with loading and the last evaluation.
        elapsed: Returns the seconds that the run has taken so far.
        path: The file with the steps' shares.
    """

    def __init__(self, seconds: float, elapsed: Callable[[], float], path: Path) -> None:
        self.seconds, self.elapsed, self.path = seconds, elapsed, path
        self.kept = 0.05 * seconds  # reserved for the end
        self.slowdown = 1.0  # how many times longer the gauge takes now than at the start
        self.end_of_epoch, self.evaluation = 0.0, 0.0  # seconds, at the machine's speed when the run began
        self.evaluated = 0.0  # how many times longer the end's evaluation takes than that of the validation split
        self.writing = 5.0  # seconds for pictures and files at the end, at the same speed
        self.steps: list[tuple[float, float]] = []
        # (seconds, share): from here the share grows linearly with time, and reaches 1 when the reserved time begins
        self._anchor: tuple[float, float] | None = None
        self._gauge: Callable[[], float] | None = None
        self._gauged_at, self._first = 0.0, 0.0
        self._gauged = [1.0]
        self._doubts = 3  # how often it may still be measured again before training ends

    def restore(self, step: int, new_from: float | None = None) -> float:
        """Read the shares of a killed run, and return the seconds that it took.

        Args:
            step: The number of finished steps.
            new_from: Seconds that the run has taken so far, if `--resume` sets a new budget. None: the budget is
                unchanged, and steps after `step` that the killed run had taken are repeated with their old shares.
        """
        content = self.path.read_bytes() if rank() == 0 and self.path.exists() else b""
        whole = len(content) // _ENTRY.size * _ENTRY.size
        steps = list(_ENTRY.iter_unpack(content[:whole]))
        if new_from is not None:
            steps = [(min(1.0, new_from / self.seconds), new_from)] * step
        while len(steps) < step:  # unlike the checkpoint this file is not fsynced: a power loss can cut off its end
            steps.append(steps[-1] if steps else (1e-3, 0.0))
        self.steps = from_first(steps)
        if rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"".join(_ENTRY.pack(*entry) for entry in self.steps))
        return max((seconds for _, seconds in self.steps), default=0.0)

    def share(self, step: int) -> float:
        """Return the fraction of the training time that is used when a step ends, in (0, 1]."""
        if step >= len(self.steps):
            self._add(from_first(self._now()))
        return abs(self.steps[step][0])

    def progress(self, plan: Plan, step: int) -> float:
        """Return the progress of a stage when a step ends, in (0, 1]: the larger of the fractions of its time and of
        its steps.
        """
        begins = abs(self.steps[plan.first - 1][0]) if plan.first else 0.0
        by_time = (self.share(step) - begins) / max(plan.until - begins, 1e-9)
        by_steps = (step + 1 - plan.first) / plan.steps if plan.steps else 0.0
        return min(1.0, max(by_time, by_steps))

    def seconds_of(self, done: int) -> float:
        """Return the seconds that the steps took so far."""
        return max(self.steps[done - 1][1] - self.steps[0][1], 1e-9)

    def ends_stage(self, plan: Plan, done: int) -> bool:
        """Return whether a stage that is not the last has used its share of the time."""
        return plan.until < 1 and abs(self.steps[done - 1][0]) >= plan.until

    def is_over(self, done: int) -> bool:
        """Return whether training ends after `done` steps, because less than half a step's time is left."""
        if done >= len(self.steps):
            if not from_first(self._is_due() and self._is_sure()):
                return False
            self._add(_OVER)
        return self.steps[done][0] == _OVER

    def _is_due(self) -> bool:
        return self._left() < 0.5 * self.step_seconds()

    def _is_sure(self) -> bool:
        """Measure the machine's speed again, and return whether training must still end: it cannot be taken back."""
        if self._gauge is None or world_size() > 1 or self._doubts == 0:
            return True
        self._doubts -= 1
        self._gauge_again(self._gauge, times=3, latest=5)
        return self._is_due()

    def step_seconds(self) -> float:
        """Return the seconds per step, from the last few."""
        last = [seconds for _, seconds in self.steps[-8:]]
        return statistics.median(b - a for a, b in pairwise(last)) if len(last) > 1 else 0.0

    def epochs(self, steps_per_epoch: int, done: int) -> float:
        """Return how many epochs fit into the whole budget, if steps and the ends of epochs go on as they are now."""
        one = steps_per_epoch * self.step_seconds() + self.slowdown * self.end_of_epoch
        return done / steps_per_epoch + max(0.0, self._left()) / max(one, 1e-9)

    def keep(self) -> None:
        """Update the time reserved for the end. From now on the share grows linearly until that time begins."""
        wanted = SLACK * self.slowdown * (self.end_of_epoch + self.evaluation + self.writing)
        self.kept = min(wanted, 0.5 * self.seconds)
        if self.steps:
            self._anchor = (self.elapsed(), abs(self.steps[-1][0]))

    def saw_end_of_epoch(self, seconds: float, validation: float) -> None:
        """Learn from the end of an epoch.

        Args:
            seconds: How long it took.
            validation: The part of it in which the whole model was evaluated on the validation split; 0: it was not.
        """
        self.end_of_epoch = seconds / self.slowdown
        if validation and self.evaluated:
            self.evaluation = self.evaluated * validation / self.slowdown
        self.keep()

    def look(self) -> None:
        """Run the gauge if that is due."""
        if self._gauge is None or world_size() > 1:  # several processes would have to measure together
            return
        if self.elapsed() - self._gauged_at > GAUGE_EVERY * self.seconds:
            self._gauge_again(self._gauge, times=1, latest=3)
            self._gauged_at = self.elapsed()

    def _gauge_again(self, gauge: Callable[[], float], times: int, latest: int) -> None:
        self._gauged += [gauge() / self._first for _ in range(times)]
        self.slowdown = statistics.median(self._gauged[-latest:])  # the median ignores an interrupted measurement
        self.keep()

    def measure(self, module: TrainingModule, job: Job) -> None:
        """Measure how long evaluation takes, and how long the gauge takes: the baseline of later measurements."""
        images = _images_to_gauge(job)

        def gauge() -> float:
            began = time.perf_counter()
            _score(module, job, [images] * times)
            return time.perf_counter() - began

        times = 1
        gauge()  # warms up
        seconds = max(GAUGE_SECONDS, GAUGE_SHARE * self.seconds)
        times = max(1, round(seconds / statistics.median(gauge() for _ in range(3))))
        # each for itself: the images of only one may be kept decoded
        val = self._seconds_of_split(module, job, "val")
        test = self._seconds_of_split(module, job, "test") if job.config.test else 0.0
        self.end_of_epoch, self.evaluation = 0.1 + val, val + test
        self.evaluated = (val + test) / val if val else 0.0
        self._first = statistics.median(gauge() for _ in range(5))  # one may be an outlier
        self._gauge, self._gauged_at = gauge, self.elapsed()
        self.keep()

    def _seconds_of_split(self, module: TrainingModule, job: Job, split: str) -> float:
        images = getattr(job.data, split)
        most = max(PROBED_SECONDS, PROBED_SHARE * self.seconds)
        return len(images) * seconds_per_image(module, job, split, most) if images else 0.0

    def _now(self) -> float:
        now = self.elapsed()
        if self._anchor is None:
            self._anchor = (now, abs(self.steps[-1][0]) if self.steps else 0.0)
        (began, share), ends = self._anchor, self.seconds - self.kept
        part = (now + self.step_seconds() - began) / max(ends - began, 1e-9)
        last = abs(self.steps[-1][0]) if self.steps else 1e-3  # the first rate is above 0
        return min(1.0, max(last, share + (1 - share) * part))

    def _left(self) -> float:
        return self.seconds - self.kept - self.elapsed()

    def _add(self, share: float) -> None:
        entry = (share, self.elapsed())
        self.steps.append(entry)
        if rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(_ENTRY.pack(*entry))


def _score(module: TrainingModule, job: Job, batches: list[Any]) -> None:
    model = module.evaluated if module.model is job.model else job.model  # else only the classifier trains
    score(model, batches, len(job.data.classes), job.device, partial(autocast, job.config.precision, job.device))


def _images_to_gauge(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    p = job.preprocessing
    shape = (GAUGE_IMAGES, p.in_chans, p.img_size, p.img_size)
    return torch.zeros(shape, device=job.device), torch.zeros(GAUGE_IMAGES, dtype=torch.int64, device=job.device)


def seconds_per_image(module: TrainingModule, job: Job, split: str, most_seconds: float = 60.0) -> float:
    """Return the seconds that evaluation takes for one image, measured on images of a split, "val" or "test".

    It loads images until 512 are loaded or half of `most_seconds` has passed, and then evaluates them.
    """
    loader = job.eval_loader(split)
    batches: list[Any] = []
    start = time.perf_counter()
    assert loader is not None
    for batch in loader:
        batches.append(batch)
        images = sum(len(labels) for _, labels in batches)
        if images >= PROBED_IMAGES or time.perf_counter() - start > most_seconds / 2:
            break
    # one call for all batches: it sums over processes, so every process must call it equally often
    _score(module, job, batches)
    return (time.perf_counter() - start) / max(sum(len(labels) for _, labels in batches), 1)
