"""Loggers: the same numbers as in metrics.csv, one log for a resumed run, and no failure that ends a training."""

import csv
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import pytest

from convmixer.cli import main
from convmixer.config import Config
from convmixer.errors import RequestError
from convmixer.train import loggers
from convmixer.train.run import resume, train

SMALL: dict[str, Any] = {
    "model": "convmixer_8_1_p2_k3",
    "workers": 0,
    "precision": "fp32",
    "draw": False,
    "epochs": 2,
    "batch_size": 256,
}


class Died(Exception):
    """What ends a run in a test."""


def die(row: dict[str, Any]) -> None:
    raise Died


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for loggers as long as it takes: a busy machine imports their packages slowly."""
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 300.0)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["csv", "none"])
def test_without_a_logger_there_are_only_the_tables(name: str, tmp_path: Path) -> None:
    train("digits", Config(**SMALL, logger=name), tmp_path / "run", quiet=True)
    assert len(rows(tmp_path / "run")) == 2
    assert not any((tmp_path / "run" / folder).exists() for folder in ("tensorboard", "loggers"))


def test_wrong_names_and_missing_packages_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else found(name))
    for name, reason in (
        ("neptune", "of tensorboard, csv, wandb, mlflow, none"),
        ("tensorboard,mlflow", r"pip install 'convmixer[mlflow]'"),
    ):
        assert main(["train", "digits", "--logger", name, "--out", str(tmp_path / "run")]) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_every_number_and_the_test_result(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Died):
        train("digits", Config(**SMALL), tmp_path / "run", on_epoch=die, quiet=True)
    result = resume(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    expected = [(int(row["step"]), float(row["val_loss"])) for row in rows(tmp_path / "run")]
    assert [event.step for event in events.Scalars("val_loss")] == [step for step, _ in expected]
    assert [event.value for event in events.Scalars("val_loss")] == pytest.approx(
        [loss for _, loss in expected], 1e-5
    )
    assert events.Scalars("test_top1")[-1].value == pytest.approx(result["test_top1"])


@pytest.fixture
def tracked(tmp_path: Path) -> str:
    """An empty MLflow store in a folder."""
    mlflow = pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    mlflow.set_tracking_uri(address)
    return address


@pytest.mark.filterwarnings("ignore")  # of the libraries that MLflow's store uses
def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, tracked: str, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    config = Config(**SMALL, logger="mlflow")
    with pytest.raises(Died):
        train("digits", config, tmp_path / "run", on_epoch=die)
    client = MlflowClient(tracked)
    result = resume(tmp_path / "run")
    experiment = client.get_experiment_by_name("convmixer")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["model"] == SMALL["model"]
    assert run.data.params["data"] == "digits"
    assert run.data.metrics["test_top1"] == pytest.approx(result["test_top1"])
    logged = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train_loss")}
    assert logged == pytest.approx(
        {int(row["step"]): float(row["train_loss"]) for row in rows(tmp_path / "run")}, 1e-4
    )
    assert f"logger   mlflow: run {run.info.run_id} in {tracked}" in capsys.readouterr().out


def test_a_server_that_is_down_is_said_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    result = train("digits", Config(**SMALL, logger="mlflow"), tmp_path / "run")
    assert result["epochs"] == 2
    assert capsys.readouterr().out.count("logger   mlflow failed, and the run continues without it") == 1


def test_a_server_that_hangs_delays_the_end_by_a_limited_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hangs:
        def log_metrics(self, *_: Any) -> None:
            time.sleep(60)

    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(loggers.Sender, "_open", lambda self: Hangs())
    monkeypatch.setattr(loggers, "check_loggers", lambda setting: None)
    monkeypatch.setattr("convmixer.train.run.check_loggers", lambda setting: None)
    began = time.monotonic()
    train("digits", Config(**SMALL, logger="mlflow"), tmp_path / "run")
    assert time.monotonic() - began < 30
    assert "logger   mlflow does not answer" in capsys.readouterr().out


def test_wandb_goes_on_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    config = Config(**SMALL, logger="wandb")
    with pytest.raises(Died):
        train("digits", config, tmp_path / "run", on_epoch=die)
    first = (tmp_path / "run" / "loggers" / "wandb.id").read_text()
    resume(tmp_path / "run")
    assert (tmp_path / "run" / "loggers" / "wandb.id").read_text() == first
    found = sorted((tmp_path / "run" / "loggers" / "wandb").glob(f"offline-run-*-{first}/run-{first}.wandb"))
    assert len(found) == 2
    deadline = time.monotonic() + 60  # their process may still write on a busy machine
    while not (all(b"train_loss" in path.read_bytes() for path in found) and b"test_top1" in found[1].read_bytes()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "logger   wandb: " in capsys.readouterr().out


def test_wandb_without_an_account_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(RequestError, match=r"wandb login.*WANDB_MODE=offline"):
        train("digits", Config(**SMALL, logger="wandb"), tmp_path / "run")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    loggers.check_loggers("wandb")
