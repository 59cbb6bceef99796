"""Optimizers other than AdamW: who updates which parameter, at which rate; a stopped run continues exactly."""

import copy

import pytest
import torch
from torch import nn

from convmixer.config import Config
from convmixer.errors import RequestError
from convmixer.models.convmixer import ConvMixer
from convmixer.models.create import create_model
from convmixer.train.optim import build_optimizer, check_optimizer, layer_scales, parameter_groups, set_rate

NAMES = ("adamw", "muon", "nmuon", "sgd", "nesterov", "lion", "adam", "nadamw", "lamb", "adopt", "mars", "laprop")


def small() -> ConvMixer:
    torch.manual_seed(0)
    return ConvMixer(8, 2, 3, 2, num_classes=4)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        set_rate(optimizer, 0.01 / (1 + step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(8) % 4).backward()
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_optimizer_takes_the_same_steps(name: str) -> None:
    config = Config(optimizer=name, layer_decay=0.8)
    model = small()
    optimizer = build_optimizer(model, config)
    take_steps(model, optimizer, 0, 3)
    again = copy.deepcopy(model)
    other = build_optimizer(again, config)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = copy.deepcopy(model.state_dict())
    take_steps(model, optimizer, 3, 6)
    take_steps(again, other, 3, 6)
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_muon_takes_the_matrices_between_stem_and_head() -> None:
    model = small()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, Config(optimizer="muon", fallback_lr_scale=0.5))
    by_muon = {names[id(p)] for group in groups if not group["use_fallback"] for p in group["params"]}
    assert by_muon == {f"blocks.{i}.{part}.weight" for i in range(2) for part in ("0.fn.0", "1")}
    assert sum(len(group["params"]) for group in groups) == len(names)
    optimizer = build_optimizer(model, Config(optimizer="muon", fallback_lr_scale=0.5, eps=1e-8))
    assert {group["fallback_lr_scale"] for group in optimizer.param_groups} == {0.5}
    assert {group["eps"] for group in optimizer.param_groups if group["use_fallback"]} == {1e-8}


def test_a_step_of_muon_is_orthogonal() -> None:
    model = small()
    before = model.blocks[0][1].weight.detach().clone()
    optimizer = build_optimizer(model, Config(optimizer="muon", weight_decay=0.0))
    take_steps(model, optimizer, 0, 1)
    step = (model.blocks[0][1].weight.detach() - before).flatten(1)
    values = torch.linalg.svdvals(step)
    assert values.max() / values.min() < 2  # those of the gradient itself lie 20 times apart and more


def test_layers_further_from_the_classifier_learn_more_slowly() -> None:
    model = small()
    scales = layer_scales(model, 0.5)
    assert scales["head.weight"] == 1
    assert scales["blocks.1.1.weight"] == 0.5
    assert scales["blocks.0.1.weight"] == 0.25
    assert scales["stem.0.weight"] == 0.125
    optimizer = build_optimizer(model, Config(layer_decay=0.5))
    set_rate(optimizer, 0.8)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.stem[0].weight)] == pytest.approx(0.1)
    assert rates[id(model.head.bias)] == pytest.approx(0.8)


def test_a_model_of_timm_has_layers_too() -> None:
    scales = layer_scales(create_model("vit_tiny_patch16_224", num_classes=2, depth=2), 0.5)
    assert scales["head.weight"] == 1 > scales["blocks.0.attn.qkv.weight"] > scales["patch_embed.proj.weight"]


def test_an_optimizer_that_cannot_serve_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="did you mean 'muon'"):
        check_optimizer(Config(optimizer="muonn"))
    with pytest.raises(RequestError, match="second derivatives"):
        check_optimizer(Config(optimizer="adahessian"))
    with pytest.raises(RequestError, match="unknown optimizer"):
        check_optimizer(Config(optimizer="bnbadam8bit"))
    with pytest.raises(RequestError, match="names its layers"):
        layer_scales(nn.Linear(2, 2), 0.5)
    with pytest.raises(RequestError, match="momentum"):
        Config(momentum=1.0)
