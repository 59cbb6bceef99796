"""Measures what a model costs: seconds per step, MACs, and memory by running a function in a fresh process.

`plan`, `compare` and `benchmark` decide what to measure; this module measures it.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convmixer.errors import RequestError
from convmixer.processes import run_program

if TYPE_CHECKING:
    import torch.nn as nn

Build = tuple[str, dict[str, Any]]  # what `create_model` is given: a name and its arguments


def fresh(function: Callable[..., Any], request: dict[str, Any], **environment: str) -> Any:
    """Call a function in a new process, so that nothing else affects its memory and speed, and return its result.

    Args:
        function: Any function of this package whose arguments and result are JSON values.
        request: The function's keyword arguments.
        environment: Environment variables for the process.

    Raises:
        RequestError: The process failed; the message is the last line that it wrote.
    """
    command = [sys.executable, "-m", "convmixer.probe", function.__module__, function.__name__]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": paths, **environment}
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=variables)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"the process ended with status {done.returncode}"]
        raise RequestError(said[-1])
    return json.loads(done.stdout.splitlines()[-1])


def median_seconds(step: Callable[[], Any], count: int, warm_up: int = 2) -> float:
    """Return the median time of a step, after a few warm-up steps."""
    times = []
    for _ in range(warm_up + count):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])


def macs(build: Build, img_size: int, in_chans: int, num_classes: int) -> int:
    """Return the multiply-accumulates of one image's forward pass, counted without computing them.

    The count is made on the meta device, because on the CPU the counter misses fused attention.

    Raises:
        RequestError: The model cannot be built with these arguments, or does not take images of this size.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = meta_model(build, in_chans, num_classes)
    try:
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, in_chans, img_size, img_size, device="meta"))
    except Exception as error:  # libraries raise many types for an image that does not fit
        raise RequestError(f"{build[0]} with {build[1]} does not take {img_size} px images: {error}") from error
    return int(counter.get_total_flops() // 2)


def meta_model(build: Build, in_chans: int, num_classes: int) -> "nn.Module":
    """Return a model on the meta device, which allocates no memory for weights.

    Raises:
        RequestError: The model cannot be built with these arguments.
    """
    import torch

    from convmixer.models.create import create_model

    name, kwargs = build
    try:
        with torch.device("meta"):
            return create_model(name, num_classes=num_classes, in_chans=in_chans, **kwargs).eval()
    except RequestError:
        raise
    except Exception as error:  # libraries raise many types if sizes do not fit together
        raise RequestError(f"{name} cannot be built with {kwargs}: {error}") from error


def _main(module: str, function: str) -> None:
    try:
        print(json.dumps(getattr(importlib.import_module(module), function)(**json.loads(sys.stdin.read()))))
    except RequestError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    run_program(lambda: _main(*sys.argv[1:]))
