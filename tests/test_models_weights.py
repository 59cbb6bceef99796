"""Weights in our format: round trips, timm reads it, names of released weights."""

import os
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn

from convmixer.errors import RequestError
from convmixer.models import hub, weights
from convmixer.models.convmixer import ConvMixer
from convmixer.models.create import create_model, load_pretrained
from convmixer.models.weights import load_model, save_model
from convmixer.preprocess import Preprocessing
from made_weights import GREY, RGB, settle


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_round_trip(tmp_path: Path) -> None:
    model = settle(ConvMixer(8, 2, 4, 2, in_chans=1, num_classes=3, act="relu")).to(memory_format=torch.channels_last)
    extra = {"recipe": "digits", "data": {"spec": "digits", "seed": 1}}
    save_model(
        tmp_path, model, architecture="mine", model_args={}, classes=["a", "b", "ü"], preprocessing=GREY, **extra
    )
    for source in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        loaded = load_model(source)
        assert loaded.classes == ("a", "b", "ü")
        assert loaded.preprocessing == GREY
        assert loaded.model.act == "relu"
        assert not loaded.model.training
        assert loaded.metadata["recipe"] == "digits"
        assert loaded.metadata["data"] == extra["data"]
        for key, value in model.state_dict().items():
            assert torch.equal(value, loaded.model.state_dict()[key]), key


def test_the_file_alone_keeps_its_meaning(tmp_path: Path) -> None:
    model = ConvMixer(8, 1, 3, 2, in_chans=1, num_classes=2)
    save_model(tmp_path, model, architecture="m", model_args={}, classes=["no", "yes"], preprocessing=GREY)
    moved = tmp_path / "elsewhere" / "renamed.safetensors"
    moved.parent.mkdir()
    (tmp_path / "model.safetensors").rename(moved)
    assert load_model(moved).classes == ("no", "yes")
    assert load_model(moved).preprocessing == GREY


def test_run_folder_gives_the_best_weights(tmp_path: Path) -> None:
    for name in ("last", "best"):
        model = ConvMixer(8, 1, 3, 2, num_classes=2)
        folder = tmp_path / "weights" / name
        save_model(folder, model, architecture="m", model_args={}, classes=[name, "x"], preprocessing=RGB)
        assert load_model(tmp_path).classes[0] == name
    assert load_model(tmp_path).source == tmp_path / "weights" / "best"


def test_other_models_round_trip(tmp_path: Path) -> None:
    args = {"img_size": 12, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = create_model("vit_tiny_patch16_224", num_classes=2, **args).eval()
    save_model(tmp_path, model, architecture="vit_tiny_patch16_224", model_args=args, classes="ab", preprocessing=RGB)
    x = torch.randn(2, 3, 12, 12)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path).model(x), model(x))
        torch.testing.assert_close(again(x), model(x))


def test_timm_loads_what_we_save(tmp_path: Path) -> None:
    model = settle(ConvMixer(8, 4, 4, 2, in_chans=1, num_classes=3, act="relu"))
    save_model(tmp_path, model, architecture="m", model_args={}, classes="abc", preprocessing=GREY)
    x = torch.randn(2, 1, 8, 8)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))
    config = timm.data.resolve_model_data_config(again)
    assert (config["input_size"], config["mean"], config["crop_pct"]) == ([1, 8, 8], [0.3], 0.9)
    assert again.pretrained_cfg["label_names"] == ["a", "b", "c"]
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=9)(x).shape == (2, 9)
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=(0, 3))
    assert [f.shape[1:] for f in features(x)] == [(8, 4, 4)] * 2
    assert hub.convmixer(dim=8, depth=1, num_classes=2).depth == 1


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("convmixer_1536_20", "convmixer_1536_20"),
        ("convmixer_768_32", "convmixer_768_32"),
        ("convmixer_1024_20", "convmixer_1024_20_ks9_p14"),
        ("convmixer_1536_20_p14_k9", "convmixer"),
    ],
)
def test_imagenet_sizes_need_only_stock_timm(ours: str, theirs: str) -> None:
    with torch.device("meta"):
        model = create_model(ours, num_classes=5)
    config = weights.hub_config(model, ours, {}, list("abcde"), Preprocessing(224), {})
    assert config["architecture"] == theirs
    assert bool(config["model_args"]) is (theirs == "convmixer")
    with torch.device("meta"):
        built = timm.create_model(config["architecture"], num_classes=5, **config["model_args"])
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_subclasses_keep_their_meaning(tmp_path: Path) -> None:
    class Faster(ConvMixer):
        """The same model computed in another way, as `fast.accelerate` makes it."""

    config = weights.hub_config(Faster(8, 1, 3, 2, num_classes=2), "convmixer_8_1_p2_k3", {}, "ab", RGB, {})
    assert config["architecture"] == "convmixer"
    assert config["model_args"]["dim"] == 8
    args = {"dim": 8, "depth": 1, "patch_size": 2, "img_size": 12, "norm": "layer"}
    model = create_model("isotropic", num_classes=2, **args).eval()
    save_model(tmp_path, model, architecture="isotropic", model_args=args, classes="ab", preprocessing=RGB)
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path).model(x), model(x))


def test_class_names_must_fit() -> None:
    with pytest.raises(ValueError, match="2 class names for 3 outputs"):
        weights.hub_config(ConvMixer(4, 1, num_classes=3), "m", {}, ["a", "b"], RGB, {})


def test_imagenet_class_names_are_distinct() -> None:
    names = weights.class_names(1000)
    assert len(set(names)) == 1000
    assert names[0].startswith("tench")


def test_shipped_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = settle(ConvMixer(8, 2, 3, 2, num_classes=3))
    save_model(tmp_path / "tiny.here", model, architecture="m", model_args={}, classes="abc", preprocessing=RGB)
    monkeypatch.setattr("convmixer.models.registry.SHIPPED", tmp_path)
    monkeypatch.setattr("convmixer.models.weights.SHIPPED", tmp_path)
    x = torch.randn(2, 3, 12, 12)
    same = create_model("tiny.here", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(same(x), model(x))
        torch.testing.assert_close(load_model("tiny.here").model(x), model(x))
    grey = create_model("tiny.here", pretrained=True, num_classes=5, in_chans=1).eval()
    with torch.no_grad():  # a grey image gives the same features in colour and in one channel
        features = model.forward_features(x[:, :1].expand(-1, 3, -1, -1))
        torch.testing.assert_close(grey.forward_features(x[:, :1]), features)
    bare = create_model("tiny.here", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        torch.testing.assert_close(bare(x), model.forward_features(x).mean((2, 3)))
    wrong = ConvMixer(8, 2, 5, 2, num_classes=3)
    with pytest.raises(RequestError, match="wrong shapes"):
        load_pretrained(wrong, "tiny.here")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ConvMixer(8, 1, num_classes=2)
    save_model(tmp_path, model, architecture="m", model_args={}, classes="ab", preprocessing=RGB)
    before = (tmp_path / "model.safetensors").read_bytes()
    nn.init.zeros_(model.head.weight)

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_model(tmp_path, model, architecture="m", model_args={}, classes="ab", preprocessing=RGB)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
