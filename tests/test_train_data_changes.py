"""Data that change while a run trains on them are noticed at the next epoch; a divergence says what is kept."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from convmixer.config import override
from convmixer.data.options import Options
from convmixer.data.watch import Watch
from convmixer.recipes import load_recipe
from convmixer.train.folder import RunFiles
from convmixer.train.run import train
from convmixer.train.session import Run
from data_sets import write_noise

SETTINGS = {
    "model": "convmixer_8_1_p4_k3",
    "epochs": 3,
    "batch_size": 16,
    "workers": 0,
    "img_size": 16,
    "draw": False,
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_noise(tmp_path / "data")


def test_changed_data_are_noticed_at_the_next_epoch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = Run._measure_epoch

    def change_once(run: Run) -> dict[str, Any]:
        if len(run.rows) == 1:
            shutil.copy(data / "a" / "0.png", data / "b" / "new.png")
        return measure(run)

    monkeypatch.setattr(Run, "_measure_epoch", change_once)
    train(str(data), override(load_recipe("finetune"), SETTINGS), out=tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if "changed while this run trains" in line]
    assert len(lines) == 1
    results = RunFiles(tmp_path / "run").read_results()
    assert results is not None
    assert results["data_changed_in_epochs"] == [2]
    assert "data_changed" in RunFiles(tmp_path / "run").log_file.read_text()


def test_touched_files_are_not_changed_data(data: Path) -> None:
    from convmixer.data.find import find

    watch = Watch(str(data), find(str(data)).checksum, Options())
    assert watch.changed() is None
    os.utime(data / "a" / "0.png", (1, 1))
    assert watch.changed() is None
    (data / "a" / "0.png").unlink()
    assert watch.changed()
    assert watch.changed() is None  # said once
    shutil.rmtree(data)
    assert "can no longer be read" in str(watch.changed())


def test_built_in_data_cannot_change() -> None:
    assert Watch("digits", "sha256:0", Options()).changed() is None


def test_a_divergence_says_whether_a_checkpoint_is_there(tmp_path: Path) -> None:
    settings = {
        "model": "convmixer_8_1_p1_k3",
        "lr": 1e30,
        "clip_norm": 0,
        "epochs": 2,
        "workers": 0,
        "precision": "fp32",
        "draw": False,
    }
    with pytest.raises(FloatingPointError, match="no checkpoint was written before"):
        train("digits", override(load_recipe("digits"), settings), out=tmp_path / "run")
