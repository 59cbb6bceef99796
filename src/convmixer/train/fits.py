"""Finds what would fit if a time budget is too short: a smaller model, smaller images, or frozen layers."""

import re
from collections.abc import Iterator

from convmixer.errors import RequestError
from convmixer.probe import macs
from convmixer.train.setup import Job, automatic_model
from convmixer.train.start import weights_at_hand

FEWEST_EPOCHS = 5.0  # fewer epochs teach little
SMALLER = ((256, 8), (256, 4), (128, 8), (128, 4), (64, 8), (64, 4), (32, 4))  # width and depth


def what_fits(job: Job, epochs: float, reading: float) -> str:
    """Return a line that says how few epochs fit into the time budget, and what would let five fit.

    Args:
        job: What is trained.
        epochs: How many epochs fit.
        reading: Share of the time in which the steps wait for images, 0 to 1.
    """
    said = f"max_time {job.config.max_time} is short: about {epochs:.1f} epochs fit"
    share = (epochs / FEWEST_EPOCHS - reading) / max(1 - reading, 1e-9)  # how much of a step's computing may remain
    if share <= 0:
        return f"{said}; {100 * reading:.0f}% of the time is spent waiting for images, see docs/data.md"
    found = [*_freezing(job), *smaller_model(job, share), *smaller_size(job, share)]
    return f"{said}; five or more would with {' or '.join(found)}" if found else said


def _freezing(job: Job) -> Iterator[str]:
    if job.config.freeze:
        return
    found = weights_at_hand(job.data.in_chans, job.preprocessing.img_size)
    if job.config.weights:
        yield "--freeze"
    elif found:
        yield f"--weights {found[0]} --freeze"


def smaller_model(job: Job, share: float) -> Iterator[str]:
    """Yield the flag of the largest ConvMixer that needs at most a share of the job's MACs, if there is one.

    Args:
        job: What is trained; patches and kernels keep their sizes.
        share: 0 to 1.
    """
    match = re.fullmatch(r"convmixer_(\d+)_(\d+)(_p\d+_k\d+)?", job.build[0])
    tail = (match and match[3]) or f"_p{max(1, round(job.preprocessing.img_size / 16))}_k5"
    most = share * _macs(job, job.build, job.preprocessing.img_size)
    for dim, depth in SMALLER:
        name = f"convmixer_{dim}_{depth}{tail}"
        if _macs(job, (name, {}), job.preprocessing.img_size) <= most:
            yield f"--model {name}"
            return


def smaller_size(job: Job, share: float) -> Iterator[str]:
    """Yield the flag of the largest image size that needs at most a share of the job's MACs, if there is one.

    Nothing is yielded for an automatic model, which costs the same at every image size.

    Args:
        job: What is trained.
        share: 0 to 1.
    """
    side = job.preprocessing.img_size
    if job.build[0] == automatic_model(side):
        return
    most = share * _macs(job, job.build, side)
    for smaller in (round(side * part / 8) for part in (6, 5, 4, 3, 2)):
        try:
            if 0 < _macs(job, job.build, smaller) <= most:
                yield f"--img-size {smaller}"
                return
        except RequestError:  # the model takes images of one size only
            return


def _macs(job: Job, build: tuple[str, dict[str, object]], side: int) -> int:
    return macs(build, side, job.preprocessing.in_chans, len(job.data.classes))
