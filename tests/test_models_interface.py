"""timm's current model interface on a ConvMixer, plain and accelerated: what timm's own model tests cover."""

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.layers
import torch
import torch.nn as nn
from timm.models import _features

from convmixer.errors import RequestError
from convmixer.fast import accelerate, optimize_for_inference
from convmixer.fast.support import say_once
from convmixer.models.convmixer import ConvMixer
from convmixer.models.weights import load_model, save_model
from convmixer.preprocess import Preprocessing

P = Preprocessing(16)

X = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))


def made(**options: object) -> ConvMixer:
    torch.manual_seed(0)
    return ConvMixer(16, 4, **({"kernel_size": 3, "patch_size": 2, "num_classes": 5} | options)).eval()


@pytest.fixture(params=["plain", "accelerated"])
def pair(request: pytest.FixtureRequest) -> tuple[ConvMixer, ConvMixer]:
    """The plain model, and a copy of it or its accelerated one."""
    plain = made()
    other = copy.deepcopy(plain)
    return plain, accelerate(other).eval() if request.param == "accelerated" else other


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_resetting_the_classifier_and_the_pooling(pair: tuple[ConvMixer, ConvMixer]) -> None:
    plain, model = pair
    features = plain.forward_features(X)
    model.reset_classifier(0)
    close(model(X), features.mean((2, 3)))
    model.reset_classifier(0, "max")
    close(model(X), features.amax((2, 3)))
    model.reset_classifier(0, "")
    close(model(X), features)
    model.reset_classifier(7, "avg")
    assert model(X).shape == (2, 7)
    with pytest.raises(RequestError, match="nothing to classify"):
        model.reset_classifier(7, "")
    with pytest.raises(RequestError, match="unknown pooling 'mean'"):
        model.reset_classifier(7, "mean")


@torch.no_grad()
def test_pruned_to_intermediate_layers(pair: tuple[ConvMixer, ConvMixer]) -> None:
    plain, model = pair
    _, wanted = plain.forward_intermediates(X, [0, -2])
    assert model.prune_intermediate_layers([0, -2]) == [0, 2]
    assert len(model.blocks) == model.depth == len(model.feature_info) == 3
    found = model.forward_intermediates(X, [0, 2], intermediates_only=True)
    for a, b in zip(found, wanted, strict=True):
        close(a, b)
    close(model(X), wanted[-1])
    with pytest.raises(RequestError, match="out of range"):
        model.prune_intermediate_layers([3])


@pytest.mark.parametrize("kernel_size", [3, 4])
def test_scripted(pair: tuple[ConvMixer, ConvMixer], kernel_size: int) -> None:
    model = pair[1] if kernel_size == 3 else made(kernel_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls scripting deprecated
        scripted = torch.jit.script(model)
        with torch.no_grad():
            close(scripted(X), model(X))


def test_every_parameter_has_a_gradient_whatever_the_pooling(pair: tuple[ConvMixer, ConvMixer]) -> None:
    model = pair[1]
    model.reset_classifier(3, "max")
    model.train()(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_activation_device_and_type() -> None:
    relu = made(act_layer=nn.ReLU)
    assert relu.act == "relu"
    assert torch.equal(relu(X), made(act="relu")(X))
    assert made(act_layer="gelu").act == "gelu"
    with pytest.raises(RequestError, match="unknown activation 'SiLU'"):
        made(act_layer=nn.SiLU)
    assert {p.dtype for p in made(dtype=torch.float64).parameters()} == {torch.float64}
    assert {p.device.type for p in made(device="meta").parameters()} == {"meta"}
    assert made(dtype=torch.float64)(X.double()).dtype == torch.float64


@torch.no_grad()
@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("layernorm2d", timm.layers.LayerNorm2d),
        (timm.layers.GroupNorm1, timm.layers.GroupNorm1),
        (functools.partial(nn.BatchNorm2d, eps=0.1), nn.BatchNorm2d),
        (nn.BatchNorm2d, nn.BatchNorm2d),
        (None, nn.BatchNorm2d),
    ],
)
def test_norm(given: Any, kind: type, capfd: pytest.CaptureFixture[str]) -> None:
    say_once.cache_clear()
    model = made(norm_layer=given, dtype=torch.float32)
    assert [type(block[3]) for block in model.blocks] == [kind] * 4
    assert type(model.stem[2]) is kind
    close(accelerate(copy.deepcopy(model)).eval()(X), model(X))
    close(optimize_for_inference(copy.deepcopy(model))(X), model(X))
    assert ("plain PyTorch instead of the kernels" in capfd.readouterr().err) is (kind is not nn.BatchNorm2d)


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown norm 'nonorm'"):
        made(norm_layer="nonorm")


def test_weights_name_their_norm(tmp_path: Path) -> None:
    about: Any = {"architecture": "convmixer", "model_args": {}, "classes": "abcde", "preprocessing": P}
    model = made(norm_layer="layernorm2d")
    save_model(tmp_path / "named", model, **about)
    close(load_model(str(tmp_path / "named")).model(X), model(X))
    with pytest.raises(RequestError, match="the norm of the model cannot be saved"):
        save_model(tmp_path / "nameless", made(norm_layer=functools.partial(nn.GroupNorm, 2)), **about)


@torch.no_grad()
def test_timms_features_only(pair: tuple[ConvMixer, ConvMixer]) -> None:
    plain, model = pair
    wanted = plain.forward_intermediates(X, [0, 2], intermediates_only=True)
    kinds = _features.FeatureGetterNet, _features.FeatureHookNet
    for getter in (kind(copy.deepcopy(model), out_indices=[0, 2]) for kind in kinds):
        for a, b in zip(getter(X), wanted, strict=True):
            close(a, b)
        assert getter.feature_info.channels() == [16, 16]
        assert getter.feature_info.reduction() == [2, 2]
