"""The rows of steps.csv: what a run writes, how they are thinned out, and that a resumed run has the same ones."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image

from convmixer.config import Config
from convmixer.train.run import train
from convmixer.train.steps import MOST_ROWS, StepRows


def test_a_run_of_one_epoch_has_curves_over_its_steps(tmp_path: Path) -> None:
    config = Config(model="convmixer_16_1_p2_k3", epochs=1, workers=0, precision="fp32", lr=0.03)
    train("digits", config, out=tmp_path / "run")
    steps = list(csv.DictReader((tmp_path / "run" / "steps.csv").read_text().splitlines()))
    epoch = next(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in steps] == list(range(1, int(epoch["step"]) + 1))
    mean = sum(float(row["train_loss"]) for row in steps) / len(steps)
    assert mean == pytest.approx(float(epoch["train_loss"]), abs=1e-4)
    assert float(steps[0]["train_loss"]) > float(steps[-1]["train_loss"])
    assert all(float(row["images_per_second"]) > 0 for row in steps)
    with Image.open(tmp_path / "run" / "pictures" / "curves.png") as picture:
        assert len(picture.getcolors(1 << 20)) > 50


def steps_of(rows: StepRows, first: int, last: int, epoch: int, total: int) -> None:
    """Take steps of a run of `total` whose loss is their number; `epoch` is its length in steps."""
    for step in range(first, last + 1):
        begins = (step - 1) // epoch * epoch + 1
        rows.add(step, torch.tensor(float(sum(range(begins, step + 1)))), 0.1, step / total, step % epoch == 0)
        if step % epoch == 0:
            rows.new_epoch()


def test_a_long_run_keeps_few_rows_whose_loss_is_the_mean_of_their_steps() -> None:
    rows = StepRows(64)
    steps_of(rows, 1, 30, epoch=25, total=10 * MOST_ROWS)
    assert [(row["step"], row["train_loss"]) for row in rows.rows] == [(10, 5.5), (20, 15.5), (25, 23), (30, 28)]


def test_rows_go_on_from_a_state_in_the_middle_of_a_row() -> None:
    whole, first, second = (StepRows(64) for _ in range(3))
    steps_of(whole, 1, 12, epoch=10, total=3 * MOST_ROWS)
    steps_of(first, 1, 4, epoch=10, total=3 * MOST_ROWS)
    second.restore(first.state(), 4)
    steps_of(second, 5, 12, epoch=10, total=3 * MOST_ROWS)
    assert [(r["step"], r["train_loss"]) for r in second.rows] == [(r["step"], r["train_loss"]) for r in whole.rows]
    second.restore(None, 12)
    assert second.rows == []
