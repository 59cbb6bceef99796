"""The learning rate against an independent piecewise-linear function, and the optimizer's parameter groups."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from convmixer.config import Config
from convmixer.errors import RequestError
from convmixer.models.convmixer import ConvMixer
from convmixer.models.create import create_model
from convmixer.train.optim import build_optimizer
from convmixer.train.schedule import knots, learning_rate, rate_at_step


@pytest.mark.parametrize(("epochs", "steps", "peak"), [(25, 98, 0.05), (200, 7, 0.01), (3, 11, 0.02), (7, 5, 1.0)])
def test_piecewise_is_the_authors_at_every_step(epochs: int, steps: int, peak: float) -> None:
    x, y = [0, epochs * 2 // 5, epochs * 4 // 5, epochs], [0, peak, peak / 20.0, 0]
    for step in range(epochs * steps):
        moment = step // steps + (step % steps + 1) / steps
        assert rate_at_step("piecewise", step, steps, epochs, peak) == np.interp([moment], x, y)[0]


# rates at the end of each epoch in the authors' log of 25 epochs with peak 0.05, printed to six digits
@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 0.005), (9, 0.05), (10, 0.04525), (18, 0.00725), (19, 0.0025), (23, 0.0005), (24, 0.0)]
)
def test_piecewise_gives_the_rates_in_the_authors_log(epoch: int, rate: float) -> None:
    assert rate_at_step("piecewise", epoch * 98 + 97, 98, 25, 0.05) == pytest.approx(rate, abs=5e-7)


@pytest.mark.parametrize("epochs", [0.3, 1, 2, 4.5])
def test_short_and_fractional_runs_still_rise_and_fall(epochs: float) -> None:
    assert list(knots(epochs)) == [0, 0.4 * epochs, 0.8 * epochs, epochs]
    assert learning_rate("piecewise", 0.4 * epochs, epochs, 0.1) == pytest.approx(0.1)
    assert learning_rate("piecewise", 0.8 * epochs, epochs, 0.1) == pytest.approx(0.005)
    assert learning_rate("piecewise", epochs, epochs, 0.1) == 0


def test_cosine_and_constant() -> None:
    assert learning_rate("constant", 0.1, 10, 0.3) == 0.3
    assert [learning_rate("cosine", e, 10, 0.3) for e in (2, 4, 7, 10)] == pytest.approx([0.15, 0.3, 0.15, 0])
    with pytest.raises(RequestError, match="did you mean 'cosine'"):
        learning_rate("cosin", 1, 10, 0.3)


def test_groups_and_settings_of_the_optimizer() -> None:
    model = ConvMixer(8, 2, 3, 2, num_classes=3)
    optimizer = build_optimizer(model, Config(weight_decay=0.02, eps=1e-3, betas=(0.8, 0.99)))
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.02, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in others["params"]} == {1}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        assert (group["eps"], group["betas"]) == (1e-3, (0.8, 0.99))
    (all_decayed,) = build_optimizer(model, Config(decay_norm_and_bias=True)).param_groups
    assert len(all_decayed["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("build", "spared"),
    [
        (("resmlp", {"dim": 16, "depth": 1}), r"bias|norm\d?\.(alpha|beta)|ls\d$"),
        (("vit_tiny_patch16_224", {"depth": 1}), r"bias|norm\d?\.weight|pos_embed|cls_token"),
        (("isotropic", {"dim": 16, "depth": 1, "mixer": "attention"}), r"bias|(stem\.2|fn\.2|0\.3)\.weight"),
        # a filter of one value is no scale
        (("convmixer_8_1_p1_k1", {"in_chans": 1}), r"bias|(stem\.2|fn\.2|0\.3)\.weight"),
    ],
)
def test_no_bias_norm_or_position_is_decayed(build: tuple[str, dict[str, Any]], spared: str) -> None:
    model = create_model(build[0], num_classes=10, **build[1])
    names = {id(p): name for name, p in model.named_parameters()}
    _, others = build_optimizer(model, Config(weight_decay=0.02)).param_groups
    found = {names[id(p)] for p in others["params"]}
    assert found == {name for name in names.values() if re.search(spared, name)}


def test_frozen_parameters_are_left_out() -> None:
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert [len(g["params"]) for g in build_optimizer(model, Config()).param_groups] == [1]
