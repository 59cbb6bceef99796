"""The plan of a run: counts are exact, memory and time are measured and grow with the work."""

import json
from pathlib import Path
from typing import Any

import pytest

import commands
from convmixer.cli import main
from convmixer.config import Config
from convmixer.train import options
from convmixer.train.options import Option, fewer_epochs
from convmixer.train.plan import plan


def _plan(**settings: Any) -> dict[str, Any]:
    return plan("digits", Config(**{"workers": 0, "precision": "fp32", **settings}))


def test_counts_by_hand_and_measurements_that_make_sense(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = _plan(model="convmixer_32_2_p1_k3", batch_size=64, epochs=3)
    monkeypatch.setattr(options, "fresh", commands.fresh)  # the process is fresh, its imports are not
    # positions x (stem + depth x (depthwise + pointwise)) + classifier
    assert small["macs"] == 64 * (32 + 2 * (32 * 9 + 32 * 32)) + 32 * 10
    assert small["parameters"] == 32 * (2 * (9 + 32 + 6) + 1 + 10 + 3) + 10
    assert small["seconds_per_epoch"] > small["steps_per_epoch"] * small["seconds_per_step"] > 0
    assert small["seconds_total"] > 2.9 * small["seconds_per_epoch"]
    large = _plan(model="convmixer_128_4_p1_k3", batch_size=512)
    # at least the two values per position, channel and layer pair that the backward pass needs, in fp32
    least = 512 * 64 * 128 * 4 * 2 * 4
    assert large["peak_memory_bytes"] > least
    assert large["peak_memory_bytes"] > 3 * small["peak_memory_bytes"]
    shown = capsys.readouterr().out
    assert "convmixer_32_2_p1_k3 on digits" in shown
    assert "images/s" in shown


@pytest.mark.usefixtures("measured_here")
def test_command_prints_json_and_advice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "digits", "--model", "convmixer_16_2_p2_k3", "--epochs", "100000000", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"parameters", "macs", "peak_memory_bytes", "seconds_per_epoch", "seconds_total"} <= {*result}
    assert any("--max-time" in line for line in result["advice"])


def test_settings_that_fit_are_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "fresh", commands.fresh)  # the process is fresh, its imports are not
    asked = Config(model="convmixer_64_4_p1_k3", epochs=100_000, batch_size=64, workers=0, max_time="1h")
    result = plan("digits", asked)
    assert result["seconds_total"] > 3600
    found = {option["what"]: option for option in result["options"]}
    assert found["your settings, fewer epochs"]["flags"] == "--max-time 1h"
    frozen = found["a classifier on the frozen layers of trained weights"]
    assert frozen["flags"].startswith("--freeze --weights convmixer_256_8.cifar10")
    smaller = found["a smaller model"]
    assert smaller["flags"].startswith("--model convmixer_64_4") or smaller["flags"].startswith(
        "--model convmixer_32"
    )
    assert all(0 < option["seconds"] <= 3600 and option["epochs"] >= 5 for option in result["options"])
    assert frozen["memory"] > 0
    assert smaller["memory"] > 0
    shown = capsys.readouterr().out
    assert "settings that fit 1h" in shown
    assert "10 classes" in shown
    assert "longest side 8 px" in shown


def test_a_frozen_run_costs_its_features_and_its_classifier(
    digits_weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "measure", lambda *_: (0, []))  # takes long, and is tested below
    weights = {"weights": str(digits_weights), "epochs": 4}
    frozen = _plan(**weights, freeze="all", views=3, unfreeze_epochs=2)
    all_layers = _plan(**weights)
    parts = frozen["seconds_of_features"] + 4 * frozen["seconds_per_epoch"] + 2 * frozen["seconds_unfrozen"]
    assert frozen["seconds_total"] == pytest.approx(parts + frozen["seconds_at_end"])
    assert frozen["seconds_of_features"] > frozen["seconds_at_end"] > 0  # three views of more images
    assert frozen["seconds_per_epoch"] == frozen["steps_per_epoch"] * frozen["seconds_per_step"]
    assert frozen["seconds_per_step"] < all_layers["seconds_per_step"]
    assert all_layers["seconds_of_features"] == all_layers["seconds_unfrozen"] == 0
    shown = capsys.readouterr().out
    assert "computed once" in shown
    assert "4 epochs, then 2 of all layers" in shown


def test_fewer_epochs_by_hand() -> None:
    assert fewer_epochs(10.0, 5.0, 20, 300.0, "5m") == Option("your settings", "nothing to add", 20, 205.0)
    assert fewer_epochs(10.0, 5.0, 20, 100.0, "100s") == Option(
        "your settings, fewer epochs", "--max-time 100s", 8, 85.0
    )
    assert fewer_epochs(100.0, 5.0, 20, 400.0, "400s") is None  # too few to learn from


def test_bad_requests_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "digits", "--batch-size", "5", "--grad-accum", "2"]) == 2
    assert "multiple of grad_accum" in capsys.readouterr().err


def test_json_has_null_for_what_is_not_finite(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convmixer.info.info", lambda: {"loss": float("nan"), "rows": [(1.5, float("inf"))]})
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"loss": None, "rows": [[1.5, None]]}
