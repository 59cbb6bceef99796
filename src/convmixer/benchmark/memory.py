"""`python -m convmixer.benchmark.memory CASE NAME`: print the peak memory of one contender in bytes. Linux only."""

import dataclasses
import gc
import json
import sys

import torch

from convmixer.benchmark import contenders
from convmixer.benchmark.case import Case
from convmixer.device import count_memory
from convmixer.models.registry import create_model


def main() -> None:
    """Measure in this process, which should do nothing else; see `measure.peak_memory`."""
    case, name = Case(**json.loads(sys.argv[1])), sys.argv[2]
    torch.set_num_threads(case.threads)
    known = [contenders.ours(case.task), *contenders.peers(case.task, case.precision)]
    prepare = next(c.prepare for c in known if c.name == name)
    prepare(_smallest(case))()  # code, thread pools and libraries; its weights are freed again
    gc.collect()
    step = prepare(case)
    gc.collect()
    peak = count_memory(torch.device("cpu"))
    for _ in range(3):
        step()
    print(peak() - _kept_bytes(case))


def _smallest(case: Case) -> Case:
    return dataclasses.replace(case, img_size=2 * case.patch_size, batch_size=2)


def _kept_bytes(case: Case) -> int:
    """Return the bytes of gradients and optimizer state that the first step adds and every later one keeps."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in create_model(case.model, num_classes=case.num_classes).parameters())
    return 3 * 4 * weights if case.task == "train" else 0  # the gradient and AdamW's two means, fp32


if __name__ == "__main__":
    main()
