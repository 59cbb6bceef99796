"""Takes training steps with Lightning's Trainer until a function says stop or a signal arrives.

For Lightning all steps are one endless epoch. Our own epochs follow from the number of the step, so training can
start in the middle of one.
"""

import itertools
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy

from convmixer.train.distributed import world_size
from convmixer.train.module import TrainingModule

OnStep = Callable[[], bool]  # called after each step; True ends the run


class _AfterStep(pl.Callback):
    """Calls a function after each step, and keeps our handler of SIGTERM.

    Lightning would install its own handler, which exits with status 0 and communicates from inside the handler.
    """

    def __init__(self, on_step: OnStep) -> None:
        self.on_step, self._sigterm = on_step, signal.getsignal(signal.SIGTERM)

    def on_train_start(self, *_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._sigterm)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.on_step():
            trainer.should_stop = True


class _Stream:
    """Wraps a loader in a plain iterable, because Lightning changes how lists and DataLoaders are read."""

    def __init__(self, loader: Iterable[Any], place: torch.device) -> None:
        self.loader, self.place = loader, place

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader) if self.place.type != "cuda" else self._on_gpu()

    def _on_gpu(self) -> Iterator[Any]:
        """Copy or make each batch on a second stream, while the GPU still computes the previous steps."""
        stream, current = torch.cuda.Stream(self.place), torch.cuda.current_stream(self.place)
        stream.wait_stream(current)
        batches = iter(self.loader)
        while True:
            with torch.cuda.stream(stream):
                batch = next(batches, None)
                moved = [t.to(self.place, non_blocking=True) for t in batch or ()]
            if batch is None:
                return
            current.wait_stream(stream)
            for t in moved:
                t.record_stream(current)
            yield moved


def fit(
    module: TrainingModule, loader: Iterable[Any], steps: int, on_step: OnStep, callbacks: Sequence[Any] = ()
) -> None:
    """Take up to `steps` optimizer steps.

    Args:
        module: What to train.
        loader: Batches from the module's next step on.
        steps: Optimizer steps, at least 1.
        on_step: Called after each step; True ends the run.
        callbacks: Lightning's callbacks; they are called before `on_step`.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    alone: list[Any] = [LightningEnvironment()] if world_size() == 1 else []  # ignore a scheduler's variables
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders, loggers and steps does not apply
        trainer = pl.Trainer(
            accelerator="gpu" if module.place.type == "cuda" else module.place.type,
            devices=local,
            num_nodes=world_size() // local,
            # the module keeps BatchNorm statistics equal; DDP would copy those of the first process
            strategy=DDPStrategy(broadcast_buffers=False) if world_size() > 1 else "auto",
            plugins=alone,
            max_epochs=1,
            limit_train_batches=steps,
            callbacks=[*callbacks, _AfterStep(on_step)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        module.train()
        trainer.fit(module, _Stream(loader, module.place))
    module.forget_graph()
    module.model.to(module.place)  # when Lightning ends, it moves the model off the GPU


def measure_speed(
    module: TrainingModule, loader: Iterable[Any], steps: int = 8, seconds: float = 10.0
) -> list[float]:
    """Return the duration in seconds of each of a few optimizer steps, after two warm-up steps.

    Afterwards the module has its old state again.

    Args:
        module: What would be trained.
        loader: Batches.
        steps: Number of steps to time.
        seconds: Time after which no further step is timed.
    """
    state = _copy(module.state())
    times = [time.perf_counter()]

    def on_step() -> bool:
        if module.place.type == "cuda":
            torch.cuda.synchronize(module.place)
        times.append(time.perf_counter())
        return world_size() == 1 and len(times) > 4 and times[-1] - times[0] > seconds

    fit(module, loader, steps + 2, on_step)
    module.restore(state)
    return [after - before for before, after in itertools.pairwise(times[2:])]


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return value.clone() if hasattr(value, "clone") else value


class StopSignals:
    """Context in which SIGTERM and Ctrl-C only set `received`, so that the current step can end and be saved.

    A second Ctrl-C interrupts at once. In other threads than the main one, signals are not handled.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._old = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
