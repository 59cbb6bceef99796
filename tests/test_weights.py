"""Weights: every dialect in, one format out, timm reads it, and every bad file gets one clear error."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn

from convmixer.errors import RequestError
from convmixer.models import hub, weights
from convmixer.models.convmixer import ConvMixer
from convmixer.models.registry import create_model
from convmixer.models.weights import load_model, load_pretrained, save_model
from convmixer.preprocess import Preprocessing

GREY = Preprocessing(8, 1, (0.3,), (0.4,), "bilinear", 0.9)
RGB = Preprocessing(12)
State = dict[str, torch.Tensor]


class Plus(nn.Module):
    """x -> fn(x) + x, as both the authors and mmpretrain name it."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fn(x) + x
        return y


def blocks(dim: int, depth: int, k: int) -> list[nn.Module]:
    """The paper's blocks in the layout of its listing: plain modules, padding="same"."""
    return [
        nn.Sequential(
            Plus(nn.Sequential(nn.Conv2d(dim, dim, k, groups=dim, padding="same"), nn.GELU(), nn.BatchNorm2d(dim))),
            nn.Conv2d(dim, dim, 1),
            nn.GELU(),
            nn.BatchNorm2d(dim),
        )
        for _ in range(depth)
    ]


def authors(dim: int, depth: int, k: int, p: int, classes: int) -> nn.Sequential:
    """The authors' whole model: one flat nn.Sequential, so its keys are numbers."""
    stem = [nn.Conv2d(3, dim, p, stride=p), nn.GELU(), nn.BatchNorm2d(dim)]
    head = [nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(dim, classes)]
    model = nn.Sequential(*stem, *blocks(dim, depth, k), *head)
    return settle(model)


def mmpretrain(dim: int, depth: int, k: int, p: int, classes: int) -> nn.Module:
    """mmpretrain's layout: backbone.stem, backbone.stages, head.fc."""
    model = nn.Module()
    model.backbone, model.head = nn.Module(), nn.Module()
    model.backbone.stem = nn.Sequential(nn.Conv2d(3, dim, p, stride=p), nn.GELU(), nn.BatchNorm2d(dim))
    model.backbone.stages = nn.Sequential(*blocks(dim, depth, k))
    model.head.fc = nn.Linear(dim, classes)
    return settle(model)


def settle(model: nn.Module) -> Any:
    """Give BatchNorm statistics that matter, so that a mapping that drops or swaps them shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


def seeded(model: nn.Module) -> Any:
    """The model with settled statistics."""
    return settle(model)


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


def good(folder: Path) -> Path:
    """A small good checkpoint to spoil."""
    path = folder / "good.pth"
    torch.save(authors(8, 2, 3, 2, 4).state_dict(), path)
    return path


class Hostile:
    """Unpickling it would run a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def test_hostile_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    state = authors(8, 1, 3, 2, 4).state_dict()
    torch.save({"state_dict": state, "args": Hostile(tmp_path / "owned")}, tmp_path / "evil.pth.tar")
    with pytest.raises(RequestError, match=r"posix\.system.*could run code.*save its state_dict alone"):
        load_model(tmp_path / "evil.pth.tar")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("kept", [0, 1, 100, 5000])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files(tmp_path: Path, kept: int, suffix: str) -> None:
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pth":
        path.write_bytes(good(tmp_path).read_bytes()[:kept])
    else:
        folder = tmp_path / "whole"
        save_model(
            folder, ConvMixer(8, 1, num_classes=2), architecture="m", model_args={}, classes="ab", preprocessing=RGB
        )
        path.write_bytes((folder / "model.safetensors").read_bytes()[:kept])
    with pytest.raises(RequestError, match="download it again"):
        load_model(path)


def spoil(edit: Callable[[State], Any]) -> Callable[[Path], None]:
    """Return what writes a checkpoint after an edit of its state dict."""

    def write(path: Path) -> None:
        state = authors(8, 2, 3, 2, 4).state_dict()
        torch.save(edit(state) or state, path)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_text("this is no checkpoint"), "not a checkpoint"),
        (lambda p: torch.save([1, 2], p), "holds a list"),
        (lambda p: torch.save({}, p), "holds no weights"),
        (lambda p: torch.save({"epoch": 3, "loss": 0.1}, p), "holds no weights"),
        (lambda p: torch.save(nn.Linear(2, 2).state_dict(), p), "not a ConvMixer of the authors, timm or mmpretrain"),
        (spoil(lambda s: {k: v for k, v in s.items() if "4.1." not in k}), "lacks blocks.1.1.weight"),
        (spoil(lambda s: s.update({"4.1.weight": torch.zeros(8, 9, 1, 1)})), r"blocks.1.1.weight is \(8, 9, 1, 1\)"),
        (spoil(lambda s: s.update({"99.weight": torch.zeros(1)})), "unexpected 99.weight"),
        (spoil(lambda s: s.update({"0.weight": torch.zeros(8)})), "lacks the patch embedding"),
        (spoil(lambda s: s.update({"7.weight": torch.zeros(4)})), "lacks head|wrong shapes"),
    ],
)
def test_bad_checkpoints_are_named(tmp_path: Path, write: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "bad.pth"
    write(path)
    with pytest.raises(RequestError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c["pretrained_cfg"].pop("mean"),
        lambda c: c["pretrained_cfg"].update(input_size=3),
        lambda c: c["model_args"].update(dim="wide"),
        lambda c: c["model_args"].update(nonsense=1),
        lambda c: c.update(architecture="no_such_model"),
        lambda c: c["model_args"].update(dim=16),
    ],
)
def test_bad_configs(tmp_path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    save_model(
        tmp_path, ConvMixer(8, 1, num_classes=2), architecture="m", model_args={}, classes="ab", preprocessing=RGB
    )
    config = json.loads((tmp_path / "config.json").read_text())
    edit(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RequestError, match="cannot read"):
        load_model(tmp_path)


def test_nan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nan.pth"
    spoil(lambda s: s.update({"2.running_var": torch.full((8,), float("nan"))}))(path)
    with pytest.raises(
        RequestError, match=r"1 of 37 tensors hold NaN or infinity, the first is stem\.2\.running_var"
    ):
        load_model(path)
    spoil(lambda s: s.update({"2.running_var": torch.full((8,), -0.1)}))(path)
    with pytest.raises(RequestError, match=r"stem\.2\.running_var holds negative variances"):
        load_model(path)


def test_missing_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match="holds no weights"):
        load_model(tmp_path)
    with pytest.raises(RequestError, match="unknown weights 'convmixer_768_23': did you mean 'convmixer_768_32'"):
        load_model("convmixer_768_23")
    for path in (tmp_path / "none.pth", tmp_path / "none", "./none", "runs/a/b"):
        with pytest.raises(RequestError, match="does not exist"):
            load_model(path)
    with pytest.raises(RequestError, match=r"cannot get timm/convmixer_1024_20_ks9_p14\.in1k from .* Go online"):
        create_model("convmixer_1024_20", pretrained=True)


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
