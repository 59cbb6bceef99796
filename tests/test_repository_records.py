"""The repository's files: every record can be read, every report follows from its records, nothing is kept twice."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from convmixer import records
from convmixer.results.report import write_report
from convmixer.results.study import StudyResults
from load_tool import load_tool

ROOT = Path(__file__).parent.parent
STUDIES = sorted(path.parent.name for path in ROOT.glob("results/*/study.json"))


def committed() -> list[Path]:
    """Return the files that git tracks and that are here."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [path for name in names.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_is_committed_twice() -> None:
    seen: dict[str, Path] = {}
    for path in committed():
        if path.stat().st_size > 1000:
            first = seen.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
            assert first == path, f"{path} is {first} byte for byte: keep one and link to it"


def test_no_database_or_weights_of_a_run_are_committed() -> None:
    assert not [path for path in committed() if path.suffix in (".db", ".pt", ".ckpt")]


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*/record*.jsonl")), ids=lambda p: p.parent.name)
def test_every_record_of_a_run_says_what_a_reader_needs(path: Path) -> None:
    found = records.read(path)
    assert found
    for record in found:
        assert 0 < record.results["test_top1"] <= 100
        assert record.results["test_n"] > 0
        assert record.data["checksum"].startswith("sha256:")
        assert record.seed is not None
        assert record.environment["processor"]
        assert record.environment["commit"]
        assert record.command.startswith("convmixer ")


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/records/*.jsonl")), ids=lambda p: p.stem)
def test_every_record_of_a_speed_can_be_read(path: Path) -> None:
    for record in records.read(path):
        assert record.results
        assert record.environment["processor"]
        assert record.environment["versions"]["torch"]
        assert record.command


@pytest.mark.parametrize("study", STUDIES)
def test_a_report_is_what_its_records_give(tmp_path: Path, study: str) -> None:
    shutil.copytree(ROOT / "results", tmp_path / "results")
    folder = tmp_path / "results" / study
    assert not StudyResults(folder).missing
    write_report(folder)
    assert (folder / "report.md").read_text() == (ROOT / "results" / study / "report.md").read_text()


@pytest.mark.parametrize("study", STUDIES)
def test_every_picture_of_a_report_is_linked_by_one(study: str) -> None:
    linked = {
        (path.parent / link).resolve()
        for path in ROOT.glob("results/*/report.md")
        for link in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
    }
    assert set((ROOT / "results" / study / "pictures").iterdir()) <= linked


def test_weights_that_ship_stand_where_their_record_says() -> None:
    path = ROOT / "results" / "authors-cifar10-seed0" / "record.jsonl"
    record = records.read(path)[0]
    shipped = (path.parent / record.results["weights"]).resolve()
    assert (shipped / "model.safetensors").is_file()
    other = json.loads((shipped / "record.jsonl").read_text())
    assert other["results"] | {"weights": ""} == record.results | {"weights": ""}


def test_the_page_of_claims_is_what_the_records_give() -> None:
    tool = load_tool("claims")
    text = tool.page()
    assert text == tool.PAGE.read_text(encoding="utf-8"), "run python tools/claims.py"
    assert len(re.findall(r"^## \d+\. ", text, re.MULTILINE)) == 14
