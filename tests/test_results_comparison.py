"""Comparing runs: which settings differ, which run leads and by how much, and what each argument means."""

import json
import re
import shutil
from pathlib import Path

import pytest

from convmixer import cli, records
from convmixer.errors import RequestError
from convmixer.results.comparison import compare_runs
from convmixer.results.runs import labels_of
from convmixer.results.statistics import wilson


@pytest.fixture
def runs(whole: Path, tmp_path: Path) -> list[Path]:
    """Three real runs of the tiny study: both arms with one seed, and one arm with another."""
    names = ("depthwise-seed0", "depthwise-seed1", "none-seed0")
    return [Path(shutil.copytree(whole / "runs" / name, tmp_path / "mine" / name)) for name in names]


def test_the_table_holds_what_the_records_hold(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["compare", *map(str, runs), "--out", str(out), "--json"]) == 0
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])
    tops = [run["test_top1"] for run in found["runs"]]
    assert tops == sorted(tops, reverse=True)
    for run in found["runs"]:
        record = records.read(Path(run["run"]) / "record.jsonl")[-1]
        assert run["test_top1"] == record.results["test_top1"]
        assert run["seconds"] == record.results["seconds"]
        low, high = wilson(round(run["test_top1"] * record.results["test_n"] / 100), record.results["test_n"])
        assert run["ci95"] == [100 * low, 100 * high]
        assert f"{run['test_top1']:.2f} ({100 * low:.2f} to {100 * high:.2f})" in said
    assert "seed" in found["differs"]
    assert "lr" not in found["differs"]
    page = (out / "comparison.html").read_text()
    assert all(run.name in page and run.name in said for run in runs)
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert {Path(path).name for path in found["pictures"]} == {"accuracy.svg", "val-top1.svg", "train-loss.svg"}
    assert all(Path(path).read_text().startswith("<svg") for path in found["pictures"])


def test_an_unfinished_run_is_shown_with_what_it_has(runs: list[Path], tmp_path: Path) -> None:
    (runs[0] / "record.jsonl").unlink()
    found = compare_runs(runs, tmp_path / "out")
    unfinished = next(run for run in found["runs"] if not run["finished"])
    assert unfinished["run"] == str(runs[0])
    assert unfinished["test_top1"] is None
    assert unfinished["epochs"] == 2
    assert any("Not finished" in note for note in found["notes"])


def test_other_data_are_said_to_make_accuracies_incomparable(runs: list[Path], tmp_path: Path) -> None:
    text = (runs[0] / "config.yaml").read_text().rpartition("# sha256")[0]
    (runs[0] / "config.yaml").write_text(re.sub(r"checksum: \S+", "checksum: sha256:other", text, count=1))
    assert any("different data" in note for note in compare_runs(runs, tmp_path / "out")["notes"])


def test_damage_is_named(runs: list[Path], tmp_path: Path) -> None:
    path = runs[0] / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 7", 1))
    with pytest.raises(RequestError, match=r"depthwise-seed0 cannot be read: config.yaml was damaged or changed"):
        compare_runs(runs, tmp_path / "out")
    for broken in ("metrics.csv", "record.jsonl"):
        (runs[1] / broken).write_text("epoch,seconds\nx,y\n")
        with pytest.raises(RequestError, match="depthwise-seed1 cannot be read"):
            compare_runs(runs[1:], tmp_path / "out")


def test_names_tell_runs_apart() -> None:
    assert labels_of([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert labels_of([Path("/a/x"), Path("/b/x"), Path("/b/y")]) == ["a/x", "b/x", "b/y"]


def test_what_could_be_two_things_is_asked_about(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs[0], "mixers")
    asked = {
        ("mixers", "digits"): "write ./mixers to mean the folder",
        ("./mixers",): "compare takes 2 to",
        ("./mixers", "mixers/."): "is named twice",
        (str(runs[0]), "digits"): "digits is not a run folder",
        (str(runs[0]), str(runs[1]), "nothing"): "nothing is not a run folder",
        ("nothing", str(runs[0])): "nothing is not a run folder",
        (str(runs[0]), str(runs[1]), "--budget", "2h"): "--budget: for studies only",
        ("mixer",): "did you mean 'mixers'?",
        (): "name a study",
    }
    for words, message in asked.items():
        assert cli.main(["compare", *words]) == 2, words
        assert message in capsys.readouterr().err


def test_many_runs_are_all_in_the_table(runs: list[Path], tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(runs[i % 3], tmp_path / "many" / f"<b>{i}")) for i in range(20)]
    found = compare_runs(copies, tmp_path / "out")
    assert len(found["runs"]) == 20
    assert any("first 12 of 20" in note for note in found["notes"])
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count("&lt;b&gt;") >= 20
    assert "<b>" not in page
