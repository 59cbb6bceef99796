"""Measures what an arm costs on this machine, with a few real steps.

The steps run in a fresh process, so that only the arm's memory is counted.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from convmixer.config import Config, override, parse_seconds, to_dict
from convmixer.device import count_memory
from convmixer.errors import RequestError
from convmixer.probe import Build, fresh, median_seconds

INFER_BATCH, INFER_BATCHES = 128, 8


def probe(data: str, config: Config, build: Build) -> dict[str, Any]:
    """Return the time and memory that training and inference of one arm take on this machine.

    Args:
        data: The data argument.
        config: The settings of a run.
        build: Registry name and arguments of the model.

    Returns:
        `train_images_per_second`; `infer_images_per_second`; `peak_memory_bytes` of training, without libraries and
        data; `seconds` of a whole run at these speeds; and `precision`, `device`, `threads` and `kernels`, with which
        they were measured.

    Raises:
        RequestError: The arm cannot be trained with these settings.
    """
    try:
        found: dict[str, Any] = fresh(_measured, {"data": data, "settings": to_dict(config), "build": build})
    except RequestError as error:
        raise RequestError(f"a few steps of {build[0]} could not be run: {error}") from error
    return found


def measure(data: str, config: Config, build: Build) -> dict[str, Any]:
    """Return the same as `probe`, measured in this process."""
    import torch

    from convmixer.train.engine import measure_speed
    from convmixer.train.setup import prepare

    started = time.perf_counter()
    job = prepare(data, config, build)
    set_up = time.perf_counter() - started
    memory = count_memory(job.device)
    step = statistics.median(measure_speed(job.module(config.epochs or 1), job.train_loader(workers=0)))
    peak = memory()
    infer = infer_speed(job.model, job.preprocessing, job.config.precision)
    splits = (job.data.val, job.data.test)
    val, test = (len(split) if split else 0 for split in splits)
    images = config.epochs * job.steps_per_epoch * job.batch_size
    needed = set_up + images * step / job.batch_size + (val * config.epochs + test) / infer
    return {
        "train_images_per_second": job.batch_size / step,
        "infer_images_per_second": infer,
        "peak_memory_bytes": peak,
        "seconds": needed if config.epochs else parse_seconds(str(config.max_time)),
        "precision": job.config.precision,
        "device": job.device.type,
        "threads": torch.get_num_threads(),
        "kernels": job.kernels,
    }


def infer_speed(model: Any, preprocessing: Any, precision: str) -> float:
    """Return images per second of inference on batches of 128, the median of a few batches."""
    import numpy as np

    from convmixer.inference import fastest

    logits = fastest(model.eval(), next(model.parameters()).device, precision)
    side = preprocessing.img_size
    batch = np.random.default_rng(0).standard_normal((INFER_BATCH, preprocessing.in_chans, side, side))
    images = batch.astype(np.float32)
    return INFER_BATCH / median_seconds(lambda: logits(images), INFER_BATCHES)


def step_cost(data: str, config: Config, make: Callable[[str, dict[str, Any]], Build]) -> Callable[..., float]:
    """Return a function (family, sizes) -> seconds per training step, which measures each size once."""
    known: dict[str, float] = {}

    def cost(family: str, sizes: dict[str, Any]) -> float:
        from convmixer.train.engine import measure_speed
        from convmixer.train.setup import prepare

        build = make(family, sizes)
        key = json.dumps(build)
        if key not in known:
            job = prepare(data, config, build)
            known[key] = statistics.median(measure_speed(job.module(config.epochs or 1), job.train_loader(workers=0)))
        return known[key]

    return cost


def _measured(data: str, settings: dict[str, Any], build: list[Any]) -> dict[str, Any]:
    return measure(data, override(Config(), settings), (build[0], build[1]))
