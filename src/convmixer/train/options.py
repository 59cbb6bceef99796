"""Finds settings that would fit into a given time: fewer epochs, a smaller model, or a classifier on frozen layers.

Each is measured with a few real steps in a fresh process, in the same way as `plan` measures the user's settings.
"""

import contextlib
import ctypes
import dataclasses
import gc
import itertools
import statistics
from dataclasses import dataclass
from typing import Any

from convmixer.config import Config, override, to_dict
from convmixer.device import count_memory
from convmixer.errors import RequestError
from convmixer.models.registry import shipped
from convmixer.probe import fresh
from convmixer.train import features
from convmixer.train.engine import measure_speed
from convmixer.train.fits import FEWEST_EPOCHS, smaller_model, smaller_size
from convmixer.train.freeze import ALL
from convmixer.train.setup import Job, prepare

SURE = 0.9  # share of the time that options may take, because a speed measured in seconds drifts over hours
MOST = 3


@dataclass(frozen=True)
class Option:
    """Settings that fit into a time.

    Args:
        what: What differs from the user's settings, in words.
        flags: The flags to add to the command.
        epochs: Passes over the training images.
        seconds: Predicted time of the whole run.
        memory: Predicted bytes for training, without libraries and data; None: the same as for the user's settings.
    """

    what: str
    flags: str
    epochs: float
    seconds: float
    memory: int | None = None


def measure(data: str, config: Config, job: Job, seconds_total: float, budget: float) -> tuple[int, list[Option]]:
    """Return the peak memory of the user's settings, and up to three options that fit into a time.

    Args:
        data: The data argument.
        config: The user's settings.
        job: The job with these settings, every "auto" resolved.
        seconds_total: Time that the job takes.
        budget: Time that the user has, in seconds.

    Raises:
        RequestError: The user's settings do not fit into the memory.
    """
    wanted = _wanted(config, job, seconds_total, budget)
    settings = [to_dict(config), *(to_dict(override(config, changed)) for _, changed in wanted)]
    try:
        found: list[Any] = fresh(_measure, {"data": data, "settings": settings})
        if "error" in found[0]:
            raise RequestError(found[0]["error"])
    except RequestError as error:
        raise RequestError(f"the settings do not fit: a few steps in a fresh process failed: {error}") from error
    options = [
        option
        for (what, changed), cost in zip(wanted, found[1:], strict=True)
        if "error" not in cost and (option := _option(what, changed, cost, job, override(config, changed), budget))
    ]
    return int(found[0]["memory"]), options


def _wanted(config: Config, job: Job, seconds_total: float, budget: float) -> list[tuple[str, dict[str, Any]]]:
    """Return what to measure besides the user's settings: a description, and the settings that change."""
    share = min(0.5, SURE * budget / max(seconds_total, 1e-9))
    found: list[tuple[str, dict[str, Any]]] = []
    for what, smaller in (("a smaller model", smaller_model), ("smaller images", smaller_size)):
        # if no model is cheap enough for all epochs, take a smaller one for fewer epochs
        flag = next(itertools.chain(smaller(job, share), smaller(job, 0.5)), None)
        if flag:
            name, value = flag.removeprefix("--").split(" ")
            found.append((what, {name.replace("-", "_"): value}))
    if not config.freeze and (weights := config.weights or next(iter(shipped()), None)):
        start = {} if config.weights else {"weights": weights, "model": "auto", "img_size": None}
        # first in the list, because it takes by far the least time
        found.insert(0, ("a classifier on the frozen layers of trained weights", {"freeze": ALL} | start))
    return found[:MOST]


def _option(
    what: str, changed: dict[str, Any], cost: dict[str, Any], job: Job, config: Config, budget: float
) -> Option | None:
    """Return an option, with fewer epochs if they do not all fit; None if fewer than five fit."""
    assert job.data.train is not None
    counts = [len(split) if split else 0 for split in (job.data.train, job.data.val, job.data.test)]
    train, val, test = counts
    once = test * cost["per_image"]
    if config.freeze == ALL:
        once += (train * max(1, config.views) + val) * cost["per_image"]
        epoch = job.steps_per_epoch * cost["step"]
    else:
        epoch = job.steps_per_epoch * cost["step"] + val * cost["per_image"]
    asked = config.epochs or Config().epochs
    epochs = min(asked, int((SURE * budget - once) / epoch))
    if epochs < min(asked, FEWEST_EPOCHS):
        return None
    flags = [_flag(name, value) for name, value in changed.items() if value is not None and value != "auto"]
    if epochs != config.epochs:
        flags.append(f"--epochs {epochs}")
    return Option(what, " ".join(flags), epochs, once + epochs * epoch, cost["memory"])


def _flag(name: str, value: Any) -> str:
    flag = "--" + name.replace("_", "-")
    return flag if (name, value) == ("freeze", ALL) else f"{flag} {value}"


def fewer_epochs(per_epoch: float, once: float, asked: int, budget: float, text: str) -> Option | None:
    """Return the user's settings with as many epochs as fit, or None if fewer than five fit.

    Args:
        per_epoch: Seconds per epoch.
        once: Seconds of the evaluation at the end.
        asked: Epochs in the user's settings.
        budget: Time that the user has, in seconds.
        text: The same time as the user typed it.
    """
    if once + asked * per_epoch <= budget:
        return Option("your settings", "nothing to add", asked, once + asked * per_epoch)
    epochs = int((SURE * budget - once) / per_epoch)
    if epochs < FEWEST_EPOCHS:
        return None
    return Option("your settings, fewer epochs", f"--max-time {text}", epochs, once + epochs * per_epoch)


def _measure(data: str, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each of the settings the memory and time of a few steps, or the "error"."""
    found: list[dict[str, Any]] = []
    for number, one in enumerate(settings):
        try:
            found.append(_cost(data, override(Config(), one | {"workers": 0, "cache": "off"}), timed=number > 0))
        except RequestError as error:
            found.append({"error": str(error)})
        _give_memory_back()
    return found


def _cost(data: str, config: Config, timed: bool) -> dict[str, Any]:
    job = prepare(data, config)
    module, cost = job.module(1.0), {}
    on_features = not features.why_not(job)
    peak = count_memory(job.device)
    if on_features:
        cost["per_image"], cost["step"] = features.measure(job, 4.0)
    else:
        cost["step"] = statistics.median(measure_speed(module, job.train_loader(workers=0), 2 if timed else 1, 4.0))
        cost["per_image"] = cost["step"] / job.batch_size / 2  # a forward pass is a third of a step
    return cost | {"memory": peak()}


def _give_memory_back() -> None:
    """Return freed memory to the system, which glibc would keep, so that it does not count in the next peak."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def plain(option: Option) -> dict[str, Any]:
    """Return an option as plain JSON types."""
    return dataclasses.asdict(option)
