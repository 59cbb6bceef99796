"""Which images are trained on and how much they count, when training ends early, and what it starts from."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from convmixer import records
from convmixer.config import Config
from convmixer.data.images import ImageSet
from convmixer.data.sampler import KeyedBatchSampler, class_odds
from convmixer.errors import RequestError
from convmixer.models.weights import load_model
from convmixer.train.chosen import training_images
from convmixer.train.run import resume, train
from convmixer.train.session import Run
from convmixer.train.setup import prepare
from convmixer.train.start import start_line

SMALL: dict[str, Any] = {"model": "convmixer_8_1_p2_k3", "workers": 0, "precision": "fp32", "draw": False}
LABELS = np.repeat([0, 1, 2], [90, 30, 10])


def images(weights: np.ndarray | None = None) -> ImageSet:
    return ImageSet(range(130), LABELS, "abc", weights=weights)  # type: ignore[arg-type]


def test_a_fraction_has_the_same_share_of_every_class_and_is_said() -> None:
    notes: list[str] = []
    chosen = training_images(images(), Config(fraction=0.2), notes)
    assert np.bincount(chosen.labels).tolist() == [18, 6, 2]
    assert notes == ["26 of 130 training images are used, the same share of every class, chosen by seed 0"]
    other = training_images(images(), Config(fraction=0.2, seed=1), [])
    assert set(other.indices) != set(chosen.indices)
    job = prepare("digits", Config(**SMALL, fraction=0.1))
    assert job.data.train is not None
    assert len(job.data.train) == 129


def test_classes_balanced_in_the_loss_weigh_the_same_in_all() -> None:
    balanced = training_images(images(), Config(balance="loss"), notes := [])
    assert balanced.weights is not None
    sums = [float(balanced.weights[label == LABELS].sum()) for label in range(3)]
    assert sums == pytest.approx([130 / 3] * 3, rel=1e-5)
    assert notes == ["in the loss, an image of the largest class has weight 0.481, one of the smallest 4.33"]
    own = np.where(LABELS == 0, 2.0, 1.0).astype(np.float32)  # of a column
    both = training_images(images(own), Config(balance="loss"), [])
    assert both.weights is not None
    assert both.weights.mean() == pytest.approx(1)
    assert both.weights[0] / both.weights[-1] == pytest.approx(2 * 10 / 90)


def test_balanced_sampling_draws_every_class_alike_and_the_same_at_every_start() -> None:
    def steps(first: int, last: int) -> list[Any]:
        sampler = KeyedBatchSampler(130, 13, seed=3, steps_per_epoch=10, odds=class_odds(LABELS))
        return [sampler.batch(step) for step in range(first, last)]

    drawn = np.bincount([LABELS[index] for batch in steps(0, 100) for _, index in batch]) / 1300
    assert drawn == pytest.approx([1 / 3] * 3, abs=0.05)
    assert steps(50, 60) == steps(0, 100)[50:60]


@pytest.mark.parametrize("balance", ["loss", "sample"])
def test_a_balanced_run_says_so(balance: str, tmp_path: Path) -> None:
    train("digits", Config(**SMALL, epochs=1, balance=balance), out=tmp_path / "run")
    assert "class" in (tmp_path / "run" / "README.md").read_text().partition("## Use")[0].rpartition("split")[2]


def test_training_ends_when_patience_does_and_a_resumed_run_at_the_same_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(**SMALL, epochs=30, patience=2, lr=1e-9, schedule="constant")  # nothing is learned
    train("digits", config, out=tmp_path / "run")
    (record,) = records.read(tmp_path / "run" / "record.jsonl")
    assert record.results["stopped_early"] is True
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    best = max(rows, key=lambda row: (float(row["top1"]), -float(row["val_loss"])))
    assert len(rows) == float(best["epoch"]) + 2 < 30
    monkeypatch.setattr(Run, "_finish", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train("digits", config, out=tmp_path / "parts")
    monkeypatch.undo()
    assert resume(tmp_path / "parts")["epochs"] == len(rows)
    last = [load_model(tmp_path / name / "weights" / "last").model.state_dict() for name in ("run", "parts")]
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])


def test_patience_needs_a_validation_split() -> None:
    with pytest.raises(RequestError, match="patience needs a validation split"):
        prepare("digits", Config(**SMALL, val_fraction=0.0, patience=3))


def test_what_a_run_starts_from_is_said_with_the_weights_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert start_line(Config(weights="some.pth"), 3, 224) == "some.pth, as --weights says"
    assert start_line(Config(), 1, 8) == "random weights, as no --weights is given"
    assert start_line(Config(), 3, 32).endswith("--weights convmixer_256_8.cifar10 --freeze")
    assert start_line(Config(), 3, 224).endswith("from timm's hub: --weights convmixer_768_32 --freeze")
    for name in ("resnet50.a1_in1k", "convmixer_768_32.in1k"):
        file = tmp_path / f"models--timm--{name}" / "snapshots" / "0" / "model.safetensors"
        file.parent.mkdir(parents=True)
        file.touch()
    assert start_line(Config(), 3, 224).endswith("on this machine fit: --weights timm/convmixer_768_32.in1k --freeze")
