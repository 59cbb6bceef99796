"""Folders of the hub, both ways: what timm, transformers and huggingface_hub write, we read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from convmixer.errors import RequestError
from convmixer.models import hub
from convmixer.models.convmixer import ConvMixer
from convmixer.models.registry import shipped
from convmixer.models.weights import load_model, save_model
from convmixer.preprocess import Preprocessing
from made_weights import settle

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(X), theirs.eval()(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convmixer"])
def test_what_timm_writes_for_the_hub_loads(tmp_path: Path, name: str, safe: bool) -> None:
    small: dict[str, Any] = {"convmixer": {"dim": 8, "depth": 2, "patch_size": 2}}.get(name, {})
    small |= {"img_size": 32} if "vit" in name else {}
    model = timm.create_model(name, num_classes=3, **small)
    config = {"label_names": ["a", "b", "c"]}
    data = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 0.9}
    model.pretrained_cfg = dict(model.pretrained_cfg, architecture=name, interpolation="bicubic", **data)
    given = {"model_config": config, "model_args": {"num_classes": 3, **small}}
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=safe, **given)
    loaded = load_model(tmp_path)
    assert loaded.classes == ("a", "b", "c")
    assert loaded.preprocessing == Preprocessing(32, 3, (0.5,) * 3, (0.25,) * 3, "bicubic", 0.9)
    equal(loaded.model, model)


@pytest.mark.parametrize("safe", [True, False])
def test_a_repository_loads_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safe: bool) -> None:
    """Also one that holds an older file of PyTorch's only; both from the hub's cache, laid out as the hub does."""
    repository = tmp_path / "models--someone--small"
    folder = repository / "snapshots" / ("a" * 40)
    model = timm.create_model("resnet10t", num_classes=3)
    timm.models.save_for_hf(model, str(folder), safe_serialization=safe, model_args={"num_classes": 3})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    equal(load_model("hf-hub:someone/small").model, model)


def test_what_transformers_writes_loads(tmp_path: Path) -> None:
    """TimmWrapper's layout: timm's config with more entries, and a prefix before every key."""
    model = settle(ConvMixer(8, 2, 3, 2, num_classes=2))
    save_model(tmp_path, model, architecture="m", model_args={}, classes="ab", preprocessing=Preprocessing(32))
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("convmixer", "sha256"):
        config.pop(key, None)
    config["pretrained_cfg"].pop("label_names")
    config |= {"architectures": ["TimmWrapperForImageClassification"], "model_type": "timm_wrapper"}
    config |= {"id2label": {"1": "dog", "0": "cat"}, "label2id": {"cat": 0, "dog": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {f"timm_model.{key}": value for key, value in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load_model(tmp_path)
    assert loaded.classes == ("cat", "dog")
    equal(loaded.model, model)


def test_what_the_hub_mixin_writes_loads(tmp_path: Path) -> None:
    from huggingface_hub import PyTorchModelHubMixin

    class Shared(ConvMixer, PyTorchModelHubMixin):
        """A ConvMixer that is shared as huggingface_hub's guide says."""

    model = settle(Shared(dim=8, depth=2, kernel_size=3, patch_size=2, num_classes=3, act="relu"))
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.model.act == "relu"
    equal(loaded.model, model)


def test_the_registered_name_creates() -> None:
    model = timm.create_model("convmixer", num_classes=5, in_chans=1)
    assert (model.dim, model.depth, model.in_chans) == (256, 8, 1)
    assert hub.__all__ == ["convmixer"]


@pytest.mark.parametrize("pool", ["max", ""])
def test_the_pooling_is_saved(tmp_path: Path, pool: str) -> None:
    model = settle(ConvMixer(8, 1, 3, 2, num_classes=2 if pool else 0, global_pool=pool))
    classes = "ab" if pool else ()
    save_model(tmp_path, model, architecture="m", model_args={}, classes=classes, preprocessing=Preprocessing(32))
    equal(load_model(tmp_path).model, model)
    equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), model)


def test_a_path_with_the_name_of_a_shipped_model_is_said(
    digits_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = shipped()[0]
    assert "was taken" not in load_model(name).found
    shutil.copytree(digits_weights, name)
    said = load_model(name).found
    assert f"{tmp_path / name} was taken, not the known model of the same name" in said
    assert "was taken" not in load_model(f"./{name}").found  # this can mean only one thing
    shutil.rmtree(name)
    (tmp_path / name).mkdir()
    with pytest.raises(RequestError, match=r"holds no weights.*to use the model, rename the path"):
        load_model(name)
