"""Runs a function of one tensor as a CUDA graph, one for each shape of the tensor."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST_GRAPHS = 16  # the largest number of shapes that have a graph at a time


class Graphs:
    """Runs a function of one tensor as a CUDA graph, so that hundreds of launches become one.

    There is a graph for each shape. The graphs share their memory, because they never run at the same time.

    Args:
        function: At every call with one shape it must launch the same kernels. It must never wait for the GPU.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function, self.lock = function, threading.Lock()
        self.known: OrderedDict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = OrderedDict()
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None  # when the last use of the graphs' shared memory ends

    def __call__(self, x: Tensor) -> Tensor:
        """Return a new tensor with the function's result."""
        with self.lock, torch.cuda.device(x.device):  # serving threads share the graph's tensors
            shape = tuple(x.shape)
            if self._done:  # the last call may have been on another stream
                torch.cuda.current_stream().wait_event(self._done)
            if shape not in self.known:
                self.known[shape] = self._capture(x)
                if len(self.known) > MOST_GRAPHS:
                    torch.cuda.synchronize()
                    self.known.popitem(last=False)
            self.known.move_to_end(shape)
            graph, inside, out = self.known[shape]
            inside.copy_(x)
            graph.replay()
            result = out.clone()
            self._done = self._done or torch.cuda.Event()
            self._done.record()
            return result

    def _capture(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        inside = x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a first run compiles the kernels and creates cuBLAS's workspaces
            self.function(inside)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = self.function(inside)
        return graph, inside, out
