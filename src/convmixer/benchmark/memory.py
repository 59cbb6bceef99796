"""The peak memory of one contender. Linux only."""

import dataclasses
import gc
from typing import Any

import torch

from convmixer.benchmark import contenders
from convmixer.benchmark.case import Case
from convmixer.device import count_memory
from convmixer.models.create import create_model


def measured_here(case: dict[str, Any], name: str) -> int:
    """Return the step memory of a contender in bytes, measured in this process; see `measure.peak_memory`."""
    of = Case(**case)
    torch.set_num_threads(of.threads)
    known = [contenders.ours(of.task), *contenders.peers(of.task, of.precision)]
    prepare = next(c.prepare for c in known if c.name == name)
    prepare(_smallest(of))()  # loads code, thread pools and libraries; its weights are freed again
    gc.collect()
    step = prepare(of)
    gc.collect()
    peak = count_memory(torch.device("cpu"))
    for _ in range(3):
        step()
    return peak() - _kept_bytes(of)


def _smallest(case: Case) -> Case:
    return dataclasses.replace(case, img_size=2 * case.patch_size, batch_size=2)


def _kept_bytes(case: Case) -> int:
    """Return the bytes of gradients and optimizer state, which the first step allocates and later ones keep."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in create_model(case.model, num_classes=case.num_classes).parameters())
    return 3 * 4 * weights if case.task == "train" else 0  # the gradient and AdamW's two means, fp32
