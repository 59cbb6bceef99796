"""A run goes on with other settings, a finished one is extended, and Lightning's callbacks are called."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from convmixer import records
from convmixer.cli import main
from convmixer.config import Config
from convmixer.errors import RequestError
from convmixer.models.weights import load_model
from convmixer.run_folder import SHARES
from convmixer.train.budget import Budget
from convmixer.train.run import resume, train

SMALL: dict[str, Any] = {"model": "convmixer_8_1_p2_k3", "precision": "fp32", "draw": False, "test": False}


class Counter(pl.Callback):
    steps = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1


def test_a_finished_run_is_extended_and_says_what_the_rate_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counter = Counter()
    train("digits", Config(**SMALL, epochs=1, workers=0), out=tmp_path / "run", callbacks=[counter])
    assert counter.steps == 20
    assert main(["train", "--resume", str(tmp_path / "run"), "--epochs", "3", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "changed  epochs: 3 (was 1)" in said
    assert "changed  workers: 1 (was 0)" in said
    assert "the learning rate follows the schedule of a run of the new length" in said
    (record,) = records.read(tmp_path / "run" / "record.jsonl")
    assert (record.results["epochs"], record.config["epochs"]) == (3, 3)
    rates = [float(line.split(",")[2]) for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]]
    assert rates[0] == 0 < rates[1]
    assert rates[2] == 0
    with pytest.raises(RequestError, match="3 epochs are done already: set epochs to more than 2"):
        resume(tmp_path / "run", changes={"epochs": 2})
    with pytest.raises(RequestError, match="lr cannot be changed"):
        resume(tmp_path / "run", changes={"lr": 1})
    assert records.read(tmp_path / "run" / "record.jsonl")  # a refusal leaves the run finished


def test_other_workers_do_not_change_the_weights(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 1 and row["step"] == 20:
            raise Stop

    config = Config(**SMALL, epochs=2, workers=0, checkpoint_seconds=1e-6)
    train("digits", config, out=tmp_path / "whole")
    with pytest.raises(Stop):
        train("digits", config, out=tmp_path / "parts", on_epoch=stop)
    resume(tmp_path / "parts", changes={"workers": 1})
    whole, parts = (load_model(tmp_path / n / "weights" / "last").model.state_dict() for n in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_new_budget_goes_on_from_the_time_that_was_taken(tmp_path: Path) -> None:
    budget = Budget(600.0, lambda: 150.0, tmp_path / SHARES)
    assert budget.restore(7, new_from=150.0) == 150.0
    assert budget.share(6) == 0.25
    assert budget.share(7) == pytest.approx(0.25, abs=0.01)
