"""Every checkpoint dialect is read as its owner means it."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from convmixer.models import weights
from convmixer.models.create import create_model
from convmixer.models.weights import load_model
from made_weights import State, authors, mmpretrain, settle


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch warns that it copies
@pytest.mark.parametrize("k", [3, 4, 8, 9])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": {f"module.{n}": t for n, t in s.items()}}])
def test_logits_equal_the_authors_sequential_form(tmp_path: Path, k: int, wrap: Callable[[State], Any]) -> None:
    theirs = authors(12, 3, k, 2, 7)
    torch.save(wrap(theirs.state_dict()), tmp_path / "model.pth.tar")
    loaded = load_model(tmp_path / "model.pth.tar")
    assert f"kernel_size {k}" in loaded.found
    assert "the authors' keys" in loaded.found
    assert len(loaded.classes) == 7
    x = torch.randn(2, 3, 10, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_mmpretrain(tmp_path: Path) -> None:
    theirs = mmpretrain(8, 2, 4, 2, 5)
    torch.save({"meta": {"epoch": 1}, "state_dict": theirs.state_dict()}, tmp_path / "mm.pth")
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        features = theirs.backbone.stages(theirs.backbone.stem(x)).mean((2, 3))
        torch.testing.assert_close(load_model(tmp_path / "mm.pth").model(x), theirs.head.fc(features))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_timm_keys_in_any_file(tmp_path: Path, suffix: str) -> None:
    theirs = settle(timm.models.convmixer.ConvMixer(8, 2, 3, 2, num_classes=4))
    path = tmp_path / f"timm{suffix}"
    if suffix == ".safetensors":
        weights.safetensors.torch.save_file(theirs.state_dict(), path)
    else:
        torch.save(theirs.state_dict(), path, _use_new_zipfile_serialization=suffix == ".pth")
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(load_model(path).model(x), theirs(x))


def test_training_checkpoint_of_timm_prefers_the_average(tmp_path: Path) -> None:
    plain, average = (authors(8, 2, 3, 2, 4).state_dict() for _ in range(2))
    content = {
        "epoch": 3,
        "arch": "convmixer",
        "args": argparse.Namespace(lr=0.01, opt="adamw"),
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.01}]},
        "state_dict": {f"module.{key}": value for key, value in plain.items()},
        "state_dict_ema": average,
    }
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    loaded = load_model(tmp_path / "checkpoint.pth.tar")
    assert "in 'state_dict_ema'" in loaded.found
    assert torch.equal(loaded.model.stem[0].weight, average["0.weight"])


def test_768_32_is_relu_and_others_gelu(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = create_model("convmixer_768_32")
    shapes = {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in model.state_dict().items()}
    from convmixer.models.dialects import find_args

    assert find_args(shapes, tmp_path)["act"] == "relu"
    assert find_args({k: v for k, v in shapes.items() if "blocks.31" not in k}, tmp_path)["act"] == "gelu"
