"""How long a run gets: the settings' epochs, or fewer if a time budget allows only fewer."""

import math
import statistics
import time
from typing import Any

from convmixer.config import parse_seconds
from convmixer.errors import RequestError
from convmixer.train.distributed import from_first, rank
from convmixer.train.engine import measure_speed
from convmixer.train.module import TrainingModule
from convmixer.train.scores import score
from convmixer.train.setup import Job

FINISH_SECONDS = 10.0  # kept of a time budget for the pictures and the last files


def length_of(job: Job, started: float) -> tuple[float, int]:
    """Return epochs and steps: the settings', or fewer if a time budget allows only fewer.

    Raises:
        RequestError: Not one step fits.
    """
    config, per_epoch = job.config, job.steps_per_epoch
    all_epochs = config.epochs + config.unfreeze_epochs
    wanted = all_epochs * per_epoch
    if config.max_time is None:
        return float(all_epochs), wanted
    module = job.module(config.epochs)
    step = statistics.median(measure_speed(module, job.train_loader(workers=config.workers)))
    val, test = (len(split) if (split := getattr(job.data, name)) else 0 for name in ("val", "test"))
    per_image = seconds_per_image(module, job) if val or test else 0.0
    left = parse_seconds(config.max_time) - (time.time() - started) - FINISH_SECONDS - (val + test) * per_image
    epochs = left / (per_epoch * step + val * per_image)
    epochs = float(math.floor(epochs)) if epochs >= 1 else epochs
    steps = from_first(min(wanted, int(epochs * per_epoch)))
    if steps < 1:
        raise RequestError(f"max_time {config.max_time} is too short: a step takes {step:.2g} s, allow more")
    if rank() == 0:
        print(f"max_time {config.max_time}: a step takes {step * 1000:.0f} ms, so {steps} of {wanted} steps fit")
    return steps / per_epoch, steps


def seconds_per_image(module: TrainingModule, job: Job) -> float:
    """Return the seconds that evaluation takes for one image, measured on up to 512."""
    loader = job.eval_loader("val") or job.eval_loader("test")
    batches: list[Any] = []
    start = time.perf_counter()
    assert loader is not None
    for batch in loader:
        batches.append(batch)
        if sum(len(labels) for _, labels in batches) >= 512:
            break
    # once, however many batches this process has: it adds up over processes
    score(module.evaluated, batches, len(job.data.classes), job.device, module.autocast)
    return (time.perf_counter() - start) / max(sum(len(labels) for _, labels in batches), 1)
