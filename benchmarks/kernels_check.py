"""What it costs to ask whether the kernels may serve a call: CPU time, the least of many repeats.

python benchmarks/kernels_check.py
"""

import time
import timeit

import torch

from convmixer.fast import accelerate
from convmixer.fast.support import unfit
from convmixer.models.convmixer import ConvMixer

DEPTHS, CALLS, REPEATS = (8, 20, 32), 500, 20


def main() -> None:
    """Print microseconds a call for models of several depths; the width does not matter."""
    images = torch.randn(1, 3, 8, 8)
    for depth in DEPTHS:
        model = accelerate(ConvMixer(8, depth, 3, 2)).eval()
        assert unfit(model, images) is None
        timer = timeit.Timer(lambda model=model: unfit(model, images), timer=time.process_time)  # type: ignore[misc]
        print(f"{depth} blocks: {min(timer.repeat(REPEATS, CALLS)) / CALLS * 1e6:.1f} µs")


if __name__ == "__main__":
    main()
