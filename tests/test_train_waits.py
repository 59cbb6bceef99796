"""A step never waits for its device, and a state can move from one kind of device to another."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from convmixer.config import Config
from convmixer.fast import accelerate
from convmixer.models.convmixer import ConvMixer
from convmixer.train.engine import fit
from convmixer.train.graph import WARM_UP, StepGraph
from convmixer.train.module import TrainingModule
from waiting import NoWaiting


def _module(**settings: Any) -> TrainingModule:
    torch.manual_seed(0)
    config = Config(**({"precision": "fp32", "clip_norm": 1.0, "ema_decay": 0.9} | settings))
    model = accelerate(ConvMixer(8, 2, 3, 2, num_classes=4))
    return TrainingModule(model, config, num_classes=4, steps_per_epoch=4, epochs=2)


def _batches(count: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 4] for _ in range(count)]


def _fit_without_waiting(module: TrainingModule, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Guard all that touches the device but mixing and erasing, which take numbers from the host."""
    take, average = module._update, module._average[0].update

    def guarded(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            with NoWaiting():
                function(*args)

        return call

    module._update = guarded(take)
    monkeypatch.setattr(module._average[0], "update", guarded(average))
    fit(module, _batches(count), count, lambda: False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_reads_no_number_from_a_tensor(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    module = _module(precision=precision, mixup=0.5, cutmix=0.5, random_erasing=0.5)
    _fit_without_waiting(module, monkeypatch, 3)
    assert module.steps_done == 3
    assert module.loss_sum > 0


def test_a_step_that_reads_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    take = TrainingModule._take_step

    def reads(self: TrainingModule, images: torch.Tensor, targets: torch.Tensor) -> None:
        take(self, images, targets)
        self.loss_sum.item()

    monkeypatch.setattr(TrainingModule, "_take_step", reads)
    with pytest.raises(AssertionError, match="reads a number"):
        _fit_without_waiting(_module(), monkeypatch, 1)


def test_a_state_of_a_gpu_goes_on_here() -> None:
    """On a GPU the learning rate is a tensor and the optimizer is capturable."""
    first, second = _module(), _module()
    fit(first, _batches(2), 2, lambda: False)
    state = copy.deepcopy(first.state())
    for group in state["optimizer"]["param_groups"]:
        group |= {"lr": torch.tensor(group["lr"]), "capturable": True}
    second.restore(state)
    for module in (first, second):
        fit(module, _batches(4)[2:], 2, lambda: False)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert float(first.loss_sum) == float(second.loss_sum)


class _Graph:
    """Stands in for a CUDA graph without a GPU: knows the step, and when it was captured and replayed."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


def test_a_graph_takes_over_after_equal_shapes_and_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    taker = StepGraph(lambda x: steps.append(len(x)))
    graph = _Graph()
    monkeypatch.setattr(taker, "_plain", lambda: taker.step(*taker._inside))
    monkeypatch.setattr(taker, "_capture", lambda: setattr(taker, "_graph", graph))
    for _ in range(WARM_UP + 2):
        taker(torch.zeros(4))
    assert (steps, graph.replays) == ([4] * WARM_UP, 2)
    taker(torch.ones(3))
    assert (steps[-1], graph.replays) == (3, 2)
    taker.forget()
    taker(torch.ones(3))
    assert steps[-2:] == [3, 3]
