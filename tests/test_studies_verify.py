"""Recorded numbers measured again: what holds, what does not, and what cannot be measured."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from convmixer.errors import RequestError
from convmixer.studies.verify import verify
from study_runs import numbers


def test_verify_measures_again(whole: Path, tmp_path: Path) -> None:
    found = verify(whole / "records.jsonl")
    assert found["holds"]
    assert len(found["records"]) == 4
    single = verify(whole / "runs" / "none-seed0" / "record.jsonl")
    assert single["records"][0]["measured"] == pytest.approx(numbers(whole)["none-seed0"][0], abs=1e-6)


def test_verify_names_what_does_not_hold(whole: Path, tmp_path: Path) -> None:
    record = json.loads((whole / "records.jsonl").read_text().splitlines()[0])
    shutil.copytree(whole / "runs" / record["name"] / "weights", tmp_path / "runs" / record["name"] / "weights")

    def changed(**parts: Any) -> Path:
        path = tmp_path / "records.jsonl"
        path.write_text(json.dumps(record | parts) + "\n")
        return path

    assert verify(changed())["holds"]
    with pytest.raises(RuntimeError, match="1 of 1 recorded numbers do not hold: depthwise-seed0"):
        verify(changed(results=record["results"] | {"test_top1": record["results"]["test_top1"] - 1}))
    with pytest.raises(RequestError, match="does not hold the data that depthwise-seed0 was measured on"):
        verify(changed(data=record["data"] | {"checksum": "sha256:0"}))
    with pytest.raises(RequestError, match="weights of depthwise-seed0 are not at"):
        verify(changed(results=record["results"] | {"weights": "nowhere"}))
    with pytest.raises(RequestError, match="no record named x"):
        verify(changed(), run="x")
    with pytest.raises(RequestError, match="cannot read"):
        verify(tmp_path / "none.jsonl")
