"""Frozen layers do not change; a classifier trained on features computed once equals one trained on images."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from convmixer.cli import main
from convmixer.config import Config
from convmixer.errors import RequestError
from convmixer.models.weights import load_model, save_model
from convmixer.preprocess import Preprocessing
from convmixer.train import features
from convmixer.train.run import resume, train
from convmixer.train.session import Run
from data_sets import write_noise

SETTINGS: dict[str, Any] = {
    "workers": 0,
    "precision": "fp32",
    "epochs": 2,
    "lr": 0.01,
    "draw": False,
    "freeze": "all",
    "ema_decay": 0.9,
    "drop_rate": 0.2,
}
TWO_STAGES = {"unfreeze_epochs": 2, "layer_decay": 0.5}


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every test with an empty folder of features."""
    monkeypatch.setattr(features, "cache_folder", lambda name: tmp_path / "cache" / name)


def run(weights: Path | str, out: Path, **more: Any) -> dict[str, torch.Tensor]:
    """Train on the digits and return the last weights."""
    train("digits", Config(**{**SETTINGS, "weights": str(weights), **more}), out=out)
    return weights_of(out)


def weights_of(run_folder: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return dict(load_model(run_folder / "weights" / which).model.state_dict())


def split(state: dict[str, torch.Tensor], *first: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the tensors whose names begin in one of these ways, and the others."""
    chosen = {key: value for key, value in state.items() if key.startswith(first)}
    return chosen, {key: value for key, value in state.items() if key not in chosen}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("views", [0, 2])
def test_features_computed_once_give_the_head_that_features_in_training_give(
    digits_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: int
) -> None:
    """With a view for each epoch, training on images sees the same ones; without views it must not augment."""
    augment: dict[str, Any] = {"scale": (0.5, 1.0), "hflip": 0.5} if views else {}
    more = {"views": views, "drop_rate": 0.0, **augment}
    once = run(digits_weights, tmp_path / "once", **more)
    monkeypatch.setattr(features, "why_not", lambda job: "a test wants it")
    each = run(digits_weights, tmp_path / "each", **more)
    start = load_model(digits_weights).model.state_dict()
    head, trunk = split(once, "head.")
    for key, value in head.items():
        torch.testing.assert_close(value, each[key], rtol=1e-3, atol=1e-5)
        assert (value - start[key]).abs().max() > 1e-3
    assert equal(trunk, split(dict(start), "head.")[1])
    assert equal(trunk, split(each, "head.")[1])


def test_the_first_blocks_stay_and_the_others_train(digits_weights: Path, tmp_path: Path) -> None:
    start = dict(load_model(digits_weights).model.state_dict())
    done = run(digits_weights, tmp_path / "run", freeze="1")
    (kept, trained), (old, before) = (split(state, "stem.", "blocks.0.") for state in (done, start))
    assert equal(kept, old)  # the running statistics of BatchNorm too
    assert not any(torch.equal(trained[key], before[key]) for key in trained if "num_batches" not in key)


@pytest.fixture(scope="module")
def whole(digits_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages that never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(digits_weights, out, **TWO_STAGES)
    return out


class Died(Exception):
    """What ends a run in a test."""


@pytest.mark.parametrize("dies_after", [1, 2, 3])  # epochs: among the classifier's, at their end, among all layers'
def test_a_frozen_run_that_died_is_resumed_exactly(
    digits_weights: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_after: int
) -> None:
    end_epoch = Run._end_epoch

    def die(row: dict[str, Any]) -> None:
        if row["epoch"] == dies_after:
            raise Died

    def end_and_die(self: Run) -> None:
        end_epoch(self)
        self._save_checkpoint()
        die(self.rows[-1])

    config = Config(**{**SETTINGS, "weights": str(digits_weights), **TWO_STAGES})
    monkeypatch.setattr(
        Run, "_end_epoch", lambda self: (end_epoch(self), self._save_checkpoint(), die(self.rows[-1]))
    )
    with pytest.raises(Died):
        train("digits", config, out=tmp_path / "parts")
    monkeypatch.undo()
    result = resume(tmp_path / "parts")
    assert result["epochs"] == 4
    for which in ("best", "last"):
        assert equal(weights_of(tmp_path / "parts", which), weights_of(whole, which)), which


def test_unfreezing_trains_all_layers_and_the_lower_ones_less(digits_weights: Path, tmp_path: Path) -> None:
    start = dict(load_model(digits_weights).model.state_dict())
    done = run(digits_weights, tmp_path / "run", unfreeze_epochs=1, layer_decay=0.1, ema_decay=0.0)
    change = {key: float((done[key] - start[key]).abs().mean()) for key in done if key.endswith("weight")}
    assert 0 < change["stem.0.weight"] < change["blocks.0.1.weight"] < change["blocks.1.1.weight"]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_any_timm_backbone_can_be_frozen(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    names = tuple("abcde")
    save_model(
        tmp_path / "weights",
        model,
        architecture=name,
        model_args={},
        classes=names,
        preprocessing=Preprocessing(model.pretrained_cfg["input_size"][1]),
    )
    write_noise(tmp_path / "data")
    settings = {**SETTINGS, "weights": str(tmp_path / "weights"), "batch_size": 8, "epochs": 1}
    train(str(tmp_path / "data"), Config(**settings), out=tmp_path / "run")
    assert "features 32 images, computed" in capsys.readouterr().out
    done, head = weights_of(tmp_path / "run"), features.classifier_of(model)
    assert head is not None
    assert equal(split(done, head[0])[1], split(dict(model.state_dict()), head[0])[1])


def test_features_are_reused_until_an_image_changes(
    digits_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_noise(tmp_path / "data")
    config = Config(**{**SETTINGS, "weights": str(digits_weights), "batch_size": 8, "epochs": 1})

    def said(out: str) -> str:
        train(str(tmp_path / "data"), config, out=tmp_path / out)
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("features"))

    assert "computed" in said("first")
    assert "from the cache" in said("second")
    one, other = (tmp_path / "data" / "a" / f"{i}.png" for i in (0, 1))
    size = max(one.stat().st_size, other.stat().st_size)
    one.write_bytes(other.read_bytes().ljust(size, b"\0"))
    assert "computed" in said("third")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--freeze"], "add --weights"),
        (["--freeze", "digits"], "freeze must be all or a number of blocks, not digits"),
        (
            ["digits", "--recipe", "finetune", "--freeze", "5", "--weights", "HERE"],
            "freeze 5: the model has 2 blocks",
        ),
        (["digits", "--views", "2"], "views needs freeze"),
        (["digits", "--freeze", "1", "--views", "2", "--weights", "HERE"], "views needs freeze all"),
        (["digits", "--unfreeze-epochs", "2"], "unfreeze_epochs needs freeze"),
    ],
)
def test_what_cannot_be_frozen_is_refused(
    arguments: list[str], message: str, digits_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(digits_weights) if part == "HERE" else part for part in arguments]
    assert main(["train", *given, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(RequestError):
        resume(tmp_path / "run")
