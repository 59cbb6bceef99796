"""The tables of docs/speed.md and the README hold what the records say."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from load_tool import load_tool


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    return load_tool("speed")


def test_the_pages_hold_what_the_records_say(speed: ModuleType) -> None:
    for path, text in speed.pages().items():
        assert path.read_text(encoding="utf-8") == text, "run: python tools/speed.py"


def test_the_newest_record_of_a_processor_counts(
    speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = speed.RECORDS / "infer_768_32_b1_bf16.jsonl"
    record = json.loads(source.read_text(encoding="utf-8").splitlines()[0])
    newer = json.loads(json.dumps(record)) | {"date": "2027-01-01"}
    newer["results"]["ours"]["images_per_second"] = 12345
    for name, line in (("infer_a.jsonl", newer), ("infer_b.jsonl", record)):
        (tmp_path / name).write_text(json.dumps(line) + "\n", encoding="utf-8")
    monkeypatch.setattr(speed, "RECORDS", tmp_path)
    rows = speed.tables("infer").splitlines()[2:]
    assert len(rows) == 1
    assert "**12,345** against" in rows[0]
    assert "infer_a.jsonl" in rows[0]
    assert rows[0].count(speed.NOT_MEASURED) == len(speed.LEVELS) - 1


def test_a_row_names_what_was_not_measured(speed: ModuleType) -> None:
    text = speed.tables("train")
    assert ", torch.compile not measured" in text
    assert text.count("torch.compile, fp32") >= 3  # the fastest other on Zen 3
