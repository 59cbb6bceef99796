"""A training step as one CUDA graph: one launch instead of a thousand, so the GPU does not wait for Python."""

import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

OFF = "CONVMIXER_CUDA_GRAPH"  # 0: no graph
WARM_UP = 3  # steps in which kernels are compiled, algorithms chosen and the optimizer's state created


class StepGraph:
    """Takes training steps, as a CUDA graph once the inputs' shapes have stayed the same for `WARM_UP` steps.

    Args:
        step: Takes a step on the given tensors. It must not wait for the GPU, nor read other tensors that may be
            replaced later.
    """

    def __init__(self, step: Callable[..., None]) -> None:
        self.step, self.possible = step, os.environ.get(OFF, "1") != "0"
        self._stream: torch.cuda.Stream | None = None
        self.forget()

    def forget(self) -> None:
        """Drop the graph, because tensors that it uses are about to be replaced."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inside: list[Tensor] = []
        self._same = 0

    def __call__(self, *inputs: Tensor) -> None:
        """Take one step."""
        if [(t.shape, t.dtype) for t in inputs] != [(t.shape, t.dtype) for t in self._inside]:
            self.forget()
            self._inside = [t.clone() for t in inputs]
        for inside, given in zip(self._inside, inputs, strict=True):
            inside.copy_(given)
        if self._graph is None and self.possible and self._same >= WARM_UP:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._plain()
        self._same += 1

    def _plain(self) -> None:
        # on a second stream, as torch asks of steps before a capture; always the same one, because torch keeps the
        # memory of each stream apart
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self.step(*self._inside)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the loader's thread pins memory
                self.step(*self._inside)
        except RuntimeError as error:
            self.possible = False
            reason = str(error).partition("\n")[0]
            print(f"convmixer: steps run without a CUDA graph: {reason}", file=sys.stderr, flush=True)
        else:
            self._graph = graph
