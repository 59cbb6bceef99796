"""Whole studies on real digits: a killed one ends like an uninterrupted one; reuse, resume, errors."""

import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from convmixer.cli import main
from convmixer.errors import RequestError
from convmixer.studies.run import compare
from convmixer.studies.runner import Runner
from study_runs import kill_in_the_middle, numbers, start, tiny, without


def test_a_study_leaves_records_and_a_report(whole: Path) -> None:
    assert set(numbers(whole)) == {"depthwise-seed0", "none-seed0", "depthwise-seed1", "none-seed1"}
    page = (whole / "report.html").read_text()
    assert page.count("<svg ") >= 5
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    text = (whole / "report.md").read_text()
    assert "Mixing positions helps" in text
    for picture in re.findall(r"\]\((pictures/[^)]+)\)", text):
        assert (whole / picture).stat().st_size > 1000


def test_a_killed_study_resumes_to_the_same_numbers(whole: Path, tmp_path: Path) -> None:
    study, out = tiny(tmp_path), without(whole, tmp_path / "out", "none-seed0")
    kill_in_the_middle(start(study, out, "--resume"), r"run 4 of 4.*none-seed0")
    said = start(study, out, "--resume").finish()
    assert numbers(out) == numbers(whole)
    assert said.count("\nstudy    run ") == 1  # nothing that was done is repeated


def test_a_folder_without_its_queue_goes_on_from_its_records(whole: Path, tmp_path: Path) -> None:
    out = without(whole, tmp_path / "out", "none-seed1")
    before = (out / "records.jsonl").read_text()
    found = compare(str(tiny(tmp_path)), "digits", out, resume=True, budget="0.001s")
    assert found["missing"] == ["none-seed1"]
    assert (out / "records.jsonl").read_text() == before


@pytest.mark.usefixtures("measured_here")
def test_equal_runs_of_another_study_are_reused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = yaml.safe_load(tiny(tmp_path).read_text())["arms"]
    arms = {"convolution": arms["depthwise"], "wider": arms["none"] | {"dim": 36, "fixed": True}}
    claim = {"says": "it mixes", "first": "convolution", "second": "wider", "relation": "better", "matters": 1.0}
    match = {"by": "parameters", "like": "convolution", "solve": "dim"}
    study, out = tiny(tmp_path, arms=arms, claims=[claim], match=match, seeds=[0]), tmp_path / "out"
    compare(str(study), "digits", out, reuse=whole)
    assert capsys.readouterr().out.count("reused   convolution-seed") == 1
    assert numbers(out)["convolution-seed0"] == numbers(whole)["depthwise-seed0"]
    assert not (out / "runs" / "convolution-seed0").exists()
    assert (out / "runs" / "wider-seed0").exists()
    assert f"({os.path.relpath(whole, out)}/pictures/depthwise-kernels.png)" in (out / "report.md").read_text()
    assert main(["verify", str(out / "records.jsonl"), "--data", "digits", "--run", "convolution-seed0"]) == 0
    assert "convolution-seed0 is depthwise-seed0 of the study tiny" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    "data", ["https://localhost:1/shards-{000..003}.tar", "hf-hub:someone/flowers", "someone/flowers"]
)
def test_a_study_file_never_leads_to_the_network_by_itself(tmp_path: Path, data: str) -> None:
    with pytest.raises(RequestError, match="names data on the network"):
        compare(str(tiny(tmp_path, data=data)), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_study_is_not_reused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no study to reuse"):
        compare(str(tiny(tmp_path)), "digits", tmp_path / "out", reuse=tmp_path / "nothing")
    assert not (tmp_path / "out").exists()


def test_failed_runs_are_exit_status_1_after_the_report(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(runner: Runner, run: str) -> dict[str, Any]:
        raise RuntimeError("no")

    monkeypatch.setattr(Runner, "train", failing)
    study, out = str(tiny(tmp_path)), without(whole, tmp_path / "out", "none-seed0")
    again = ["compare", study, "digits", "--out", str(out), "--resume"]
    assert main([*again, "--json"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == ["none-seed0"]
    assert "RuntimeError: no" in (out / "report.html").read_text()
    monkeypatch.undo()
    assert main(again) == 0
    assert "none-seed0" in numbers(out)


def test_a_study_does_not_go_on_with_other_data(whole: Path, tmp_path: Path) -> None:
    study, other, out = str(tiny(tmp_path)), tmp_path / "digits", tmp_path / "out"
    shutil.copytree(whole, out)
    pixels = np.random.default_rng(0)
    for split, kind, number in itertools.product(("train", "test"), "0123456789", range(2)):
        path = other / split / kind / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 255, (8, 8), np.uint8)).save(path)
    with pytest.raises(RequestError, match="does not hold the data that the study was started with"):
        compare(study, str(other), out, resume=True)
    with pytest.raises(RequestError, match="that queue holds the study already"):
        compare(study, str(other), tmp_path / "new", storage=f"sqlite:///{out}/queue.db")


def test_folders_are_not_mixed_up(whole: Path, tmp_path: Path) -> None:
    study = str(tiny(tmp_path))
    with pytest.raises(RequestError, match="continue it with --resume"):
        compare(study, "digits", whole)
    with pytest.raises(RequestError, match="has changed since"):
        compare(str(tiny(tmp_path, seeds=[0, 1, 2])), "digits", whole, resume=True)
    with pytest.raises(RequestError, match="holds the study tiny"):
        compare("smoke", "digits", whole, resume=True)
    with pytest.raises(RequestError, match="start it without --worker first"):
        compare(study, "digits", tmp_path / "new", worker=True)


def test_nothing_trains_when_a_match_is_impossible(tmp_path: Path) -> None:
    match = {"by": "parameters", "like": "depthwise", "tolerance": 0.00001}
    with pytest.raises(RequestError, match="arm none: impossible match"):
        compare(str(tiny(tmp_path, match=match)), "digits", tmp_path / "out")
    assert not (tmp_path / "out" / "runs").exists()
