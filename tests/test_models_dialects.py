"""Checkpoints of every known dialect are read as their own programs read them."""

import argparse
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn

from convmixer.cli import main
from convmixer.errors import RequestError
from convmixer.inference import load_classifier
from convmixer.models import weights
from convmixer.models.convmixer import ConvMixer
from convmixer.models.create import create_model
from convmixer.models.weights import load_model, save_model
from convmixer.preprocess import Preprocessing
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


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def small(seed: int = 0) -> State:
    torch.manual_seed(seed)
    return settle(ConvMixer(8, 2, 3, 2, num_classes=3)).state_dict()


AVERAGED = {"n_averaged": torch.tensor(5)}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s, other: AVERAGED | prefixed("module.", s),  # torch's AveragedModel
        lambda s, other: {"model": other, "model_ema": AVERAGED | prefixed("module.", s), "epoch": 3},  # torchvision
        lambda s, other: {"model": other, "ema": s},
        lambda s, other: {"model": other, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "swa_model": s},
        lambda s, other: prefixed("model.", other) | prefixed("ema_model.", s),
        lambda s, other: {"state_dict": prefixed("net.", s), "hyper_parameters": {"lr": 0.1}},  # Lightning
        lambda s, other: {"state_dict": prefixed("model.", s) | {"criterion.weight": torch.ones(3)}},
        lambda s, other: prefixed("timm_model.", s),  # transformers' TimmWrapper
        lambda s, other: {"net": s, "epoch": 1},
        lambda s, other: {"weights": s},
        lambda s, other: {"a": {"b": {"c": prefixed("module._orig_mod.", s)}}},
        lambda s, other: {key.replace("stem.", "stem._orig_mod."): value for key, value in s.items()},
    ],
)
def test_weights_under_any_prefix_in_any_container(tmp_path: Path, wrap: Callable[[State, State], Any]) -> None:
    torch.save(wrap(small(0), small(1)), tmp_path / "w.pth")
    loaded = load_model(tmp_path / "w.pth")
    for key, value in small(0).items():
        assert torch.equal(loaded.model.state_dict()[key], value), key


def test_what_is_not_taken_is_said(tmp_path: Path) -> None:
    extra = {"criterion.weight": torch.ones(3)}
    torch.save({"model": small(1), "ema": prefixed("module.", small(0)) | extra}, tmp_path / "w.pth")
    found = load_model(tmp_path / "w.pth").found
    assert "in 'ema module.'" in found
    assert "not taken: model" in found
    assert "left out: criterion.weight" in found


def test_several_models_alike_are_refused(tmp_path: Path) -> None:
    torch.save(prefixed("student.", small(0)) | prefixed("teacher.", small(1)), tmp_path / "w.pth")
    with pytest.raises(RequestError, match=r"several models, one under 'student\.' and one under 'teacher\.': save"):
        load_model(tmp_path / "w.pth")


def test_timms_arguments_say_the_preprocessing(tmp_path: Path) -> None:
    args = {"img_size": 64, "mean": [0.5] * 3, "std": [0.25], "crop_pct": 0.9, "interpolation": "bilinear"}
    torch.save({"state_dict": small(), "args": argparse.Namespace(**args)}, tmp_path / "w.pth.tar")
    loaded = load_model(tmp_path / "w.pth.tar")
    assert loaded.preprocessing == Preprocessing(64, 3, (0.5,) * 3, (0.25,) * 3, "bilinear", 0.9)
    assert "from its args: 64 px" in loaded.found
    assert "assumed" not in loaded.found
    torch.save({"state_dict": small(), "args": {"input_size": [3, 48, 48], "mean": None}}, tmp_path / "w.pth")
    loaded = load_model(tmp_path / "w.pth")
    assert loaded.preprocessing.img_size == 48
    assert "assumed mean (0.4914, 0.4822, 0.4465)" in loaded.found
    torch.save({"state_dict": small(), "args": {"img_size": 10**6}}, tmp_path / "w.pth")
    with pytest.raises(RequestError, match="img_size must be a whole number from 1 to 4096"):
        load_model(tmp_path / "w.pth")


def test_what_weights_expect_can_be_given(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "w.pth")
    given = {"img_size": 20, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.8}
    loaded = load_model(tmp_path / "w.pth", "relu", interpolation="nearest", **given)
    assert loaded.preprocessing == Preprocessing(20, 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "nearest", 0.8)
    assert loaded.model.act == loaded.metadata["model_args"]["act"] == "relu"
    assert isinstance(loaded.model.stem[1], nn.ReLU)
    assert "20 px as asked instead of 32" in loaded.found
    assert "relu as asked instead of gelu" in loaded.found
    with pytest.raises(RequestError, match="crop_pct"):
        load_model(tmp_path / "w.pth", crop_pct=2.0)


def test_every_field_but_the_channels_can_be_given(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "w.pth")
    before = load_model(tmp_path / "w.pth").preprocessing
    for item in fields(Preprocessing):
        given = {item.name: 12 if item.name == "bits" else getattr(before, item.name)}
        if item.name == "in_chans":
            with pytest.raises(RequestError, match="in_chans cannot be overridden, only act, img_size"):
                load_model(tmp_path / "w.pth", **given)
        else:
            loaded = load_model(tmp_path / "w.pth", **given)
            assert loaded.preprocessing == replace(before, **given)
            assert "as asked instead of" in loaded.found
    assert "16-bit images use 12 bits as asked instead of 16" in loaded.found


@pytest.mark.parametrize(
    ("name", "sizes"), [("resmlp", {"img_size": 16}), ("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 12})]
)
def test_a_model_of_one_image_size_refuses_another(tmp_path: Path, name: str, sizes: dict[str, int]) -> None:
    given = {"dim": 8, "depth": 1, **sizes} if name == "resmlp" else {**sizes, "num_heads": 1}
    side = sizes.get("img_size", 224)
    model = create_model(name, num_classes=2, **given)
    save_model(
        tmp_path, model, architecture=name, model_args=given, classes=["a", "b"], preprocessing=Preprocessing(side)
    )
    with pytest.raises(RequestError, match=rf"was made for {side} px and does not take 32 px .*leave --img-size out"):
        load_model(tmp_path, img_size=32)
    assert load_model(tmp_path, img_size=side, crop_pct=1.0).preprocessing.crop_pct == 1


def test_an_image_smaller_than_a_patch_is_refused(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "w.pth")
    with pytest.raises(RequestError, match="does not take 1 px"):
        load_model(tmp_path / "w.pth", img_size=1)


def test_commands_take_what_weights_expect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(settle(ConvMixer(8, 1, 3, 1, in_chans=1, num_classes=10)).state_dict(), tmp_path / "w.pth")
    flags = ["--img-size", "8", "--mean", "0.3", "--std", "0.4", "--act", "relu"]
    assert main(["val", str(tmp_path / "w.pth"), "digits", "--limit", "8", *flags]) == 0
    assert "8 px as asked instead of 32; mean (0.3,) as asked" in capsys.readouterr().out
    out = tmp_path / "w.onnx"
    assert (
        main(["export", str(tmp_path / "w.pth"), "--data", "digits", "--limit", "4", "--out", str(out), *flags]) == 0
    )
    assert load_classifier(out).preprocessing.img_size == 8
    assert main(["val", str(out), "digits", "--img-size", "8"]) == 2
    assert "leave out --img-size" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "w.pth"), "--act", "relu", "--out", str(tmp_path / "c")]) == 0
    assert load_model(tmp_path / "c").model.act == "relu"
    assert main(["val", str(tmp_path / "w.pth"), "digits", "--std", "0"]) == 2
