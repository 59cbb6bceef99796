"""Batches concurrent requests with a queue and one worker. The worker never waits for a batch to fill."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

Maps = np.ndarray | None
Compute = Callable[[np.ndarray, bool], tuple[np.ndarray, Maps]]


class QueueFull(Exception):
    """The images do not fit into the queue."""


@dataclass
class _Item:
    array: np.ndarray
    explain: bool
    answer: "asyncio.Future[tuple[np.ndarray, Maps]]"


class Batcher:
    """Runs a model in one thread on all images that wait, up to `max_batch`.

    A batch forms while the previous one is computed. There is no timer: a single request is computed at once.

    Args:
        compute: Images (B, C, H, W), and whether maps are wanted -> logits (B, classes), and maps (B, k, h, w) or
            None.
        max_batch: Images computed at once.
        max_queue: Images that may wait.
        on_batch: Called with the size of each batch.
    """

    def __init__(
        self, compute: Compute, max_batch: int, max_queue: int, on_batch: Callable[[int], Any] = lambda size: None
    ) -> None:
        self.compute, self.max_batch, self.max_queue, self.on_batch = compute, max_batch, max_queue, on_batch
        self.waiting: asyncio.Queue[_Item] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, arrays: list[np.ndarray], explain: bool) -> list[tuple[np.ndarray, Maps]]:
        """Return for each array (C, H, W) its logits (classes,), and its maps (k, h, w) or None, in order.

        Raises:
            QueueFull: The images do not fit into the queue.
        """
        if self.waiting.qsize() + len(arrays) > self.max_queue:
            raise QueueFull
        loop = asyncio.get_running_loop()
        items = [_Item(array, explain, loop.create_future()) for array in arrays]
        for item in items:
            self.waiting.put_nowait(item)
        return await asyncio.gather(*(item.answer for item in items))

    def start(self) -> None:
        """Start the worker on the running event loop."""
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Stop the worker after the batch that it is computing."""
        if self._worker:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        self._thread.shutdown()

    async def _work(self) -> None:
        while True:
            items = [await self.waiting.get()]
            while len(items) < self.max_batch and not self.waiting.empty():
                items.append(self.waiting.get_nowait())
            items = [item for item in items if not item.answer.done()]  # a request that gave up is done already
            if items:
                await self._answer(items)

    async def _answer(self, items: list[_Item]) -> None:
        batch = np.stack([item.array for item in items])
        explain = any(item.explain for item in items)
        try:
            loop = asyncio.get_running_loop()
            logits, maps = await loop.run_in_executor(self._thread, self.compute, batch, explain)
        except Exception as error:
            for item in items:
                if not item.answer.done():
                    item.answer.set_exception(error)
            return
        self.on_batch(len(items))
        for number, item in enumerate(items):
            if not item.answer.done():
                item.answer.set_result((logits[number], None if maps is None else maps[number]))
