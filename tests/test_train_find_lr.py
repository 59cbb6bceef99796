"""The learning-rate finder: a ramp of rates, a picture, and a rate that trains."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convmixer.cli import main
from convmixer.config import Config
from convmixer.run_folder import is_own_output
from convmixer.train import find_lr
from convmixer.train.run import train

SMALL: dict[str, Any] = {
    "model": "convmixer_16_2_p2_k3",
    "workers": 0,
    "precision": "fp32",
    "batch_size": 128,
    "draw": False,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("rates") / "found"
    return find_lr.find_lr("digits", Config(**SMALL), out), out


def test_the_rate_found_trains_and_a_much_smaller_one_does_not(
    found: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    lr = found[0]["lr"]
    assert 1e-4 < lr < found[0]["lowest_at"] < 10
    good = train("digits", Config(**SMALL, epochs=2, lr=lr), tmp_path / "good", quiet=True)
    tiny = train("digits", Config(**SMALL, epochs=2, lr=lr / 1000), tmp_path / "tiny", quiet=True)
    assert good["test_top1"] > tiny["test_top1"] + 15


def test_the_folder_holds_the_picture_and_the_numbers_and_is_no_data(found: tuple[dict[str, Any], Path]) -> None:
    result, out = found
    assert sorted(path.name for path in out.iterdir()) == ["lr.json", "lr.png"]
    table = json.loads((out / "lr.json").read_text())
    assert len(table["rates"]) == len(table["losses"]) == len(table["smoothed"]) == result["steps"]
    assert table["rates"][0] == pytest.approx(find_lr.LOWEST)
    assert table["losses"][0] == pytest.approx(np.log(10), abs=0.7)  # at chance, before anything is learned
    assert np.all(np.diff(table["rates"]) > 0)
    with Image.open(out / "lr.png") as picture:
        assert min(picture.size) > 300
    assert is_own_output(out)


def test_the_same_seed_finds_the_same(found: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    again = find_lr.find_lr("digits", Config(**SMALL), tmp_path / "again")
    assert again["lr"] == found[0]["lr"]


def test_a_classifier_on_frozen_layers_has_a_rate_too(
    digits_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    start = ["--freeze", "--weights", str(digits_weights), "--model", "auto"]
    flags = ["--find-lr", *start, "--out", str(tmp_path / "out"), "--json"]
    status, shown = main(["train", "digits", *flags]), capsys.readouterr()
    assert status == 0, shown.err
    *lines, last = shown.out.splitlines()
    assert json.loads(last)["run"] == str(tmp_path / "out")
    assert any(line.startswith("rate ") for line in lines)


def test_by_hand() -> None:
    rates = np.geomspace(1e-4, 1, 9)
    losses = np.array([2.0, 2.0, 1.9, 1.4, 1.2, 1.1, 1.0, 1.5, 3.0])
    assert find_lr.suggest(rates, losses) == float(f"{rates[3]:.1e}")
    assert find_lr.suggest(rates, np.linspace(1, 2, 9)) is None
    assert find_lr.suggest(rates, np.linspace(1, 0.99, 9)) is None
    assert find_lr.smooth(np.full(7, 2.5)) == pytest.approx(np.full(7, 2.5))


def test_what_it_cannot_do_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--find-lr", "--resume", str(tmp_path)]) == 2
    assert "leave out --find-lr" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    assert main(["train", "digits", "--find-lr", "--out", str(tmp_path / "full")]) == 2
    assert "is not empty" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "digits", "--find-lr"]) == 2
    assert "without torchrun" in capsys.readouterr().err
