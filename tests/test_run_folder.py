"""Which folders are runs or other output of convmixer, and which samples belong to which weights."""

import re
from pathlib import Path

import pytest

from convmixer import run_folder
from convmixer.run_folder import RunFolder, is_own_output, is_run, run_of, sample_files, weights_folders


def make(*paths: Path, text: str = "") -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make(tmp_path / "run" / "config.yaml", text="command: convmixer train digits\nrecipe: null\n")
    return tmp_path / "run"


def test_a_run_is_told_from_another_programs_config(run: Path, tmp_path: Path) -> None:
    make(tmp_path / "other" / "config.yaml", text="name: mine\n")
    make(tmp_path / "other" / "weights" / "model.bin")
    assert is_run(run)
    assert is_run(str(run))
    assert not is_run(tmp_path / "other")
    assert not is_run(tmp_path / "none")
    assert not is_run(tmp_path / ("x" * 300))


def test_the_names_of_a_runs_files_stand_in_one_module() -> None:
    names = [value for name, value in vars(run_folder).items() if name.isupper() and isinstance(value, str)]
    files = re.compile("|".join(re.escape(name) for name in names if "." in name and name != run_folder.CARD))
    package = Path(run_folder.__file__).parent
    users = {path.name for path in package.rglob("*.py") if files.search(path.read_text(encoding="utf-8"))}
    assert users == {"run_folder.py", "pt2.py"}  # of a .pt2, members that end in _config.json


def test_published_runs_are_runs() -> None:
    results = Path(__file__).parent.parent / "results"
    assert is_run(results / "authors-cifar10-3-epochs-seed0")
    assert is_own_output(results / "mixers")


def test_what_convmixer_wrote_is_recognised(run: Path, tmp_path: Path) -> None:
    make(tmp_path / "study" / "study.json", tmp_path / "study" / "records.jsonl")
    make(*(tmp_path / "page" / name for name in ("index.html", "model.js", "local.js")))
    make(tmp_path / "weights" / "model.safetensors", tmp_path / "weights" / "config.json")
    make(tmp_path / "all" / "study.json", tmp_path / "photos" / "cat.jpg", tmp_path / "photos" / "index.html")
    for name in ("run", "study", "page", "weights"):
        assert is_own_output(tmp_path / name), name
    for name in ("all", "photos", "none"):
        assert not is_own_output(tmp_path / name), name


def test_a_folder_of_runs_is_recognised_unless_it_holds_anything_else(run: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert not is_own_output(tmp_path / "runs")
    run.rename(tmp_path / "runs" / "1")
    assert is_own_output(tmp_path / "runs")
    make(tmp_path / "runs" / "cat.jpg")
    assert not is_own_output(tmp_path / "runs")


def test_the_best_weights_come_before_the_last(run: Path) -> None:
    assert weights_folders(run) == []
    make(RunFolder(run).weights("last") / "model.safetensors")
    assert weights_folders(run) == [run / "weights" / "last"]
    make(RunFolder(run).weights("best") / "model.safetensors")
    assert weights_folders(run) == [run / "weights" / "best", run / "weights" / "last"]
    assert run_of(run / "weights" / "best" / "model.safetensors") == run
    assert run_of(run.parent) is None


def test_samples_are_those_of_the_run_and_of_no_other_folder(run: Path) -> None:
    weights, export = run / "weights" / "best" / "model.safetensors", run / "exports" / "model.onnx"
    make(weights, export, run / "samples" / "1.png")
    for source in (run, weights, weights.parent, export):
        assert [file.name for file in sample_files(source)] == ["1.png"]
    (run / "config.yaml").write_text("mine: 1\n")
    (run / "config.json").touch()
    assert not sample_files(weights)  # anybody's project may look like this
    assert not sample_files(export)


def test_a_link_out_of_the_folder_is_no_sample(run: Path, tmp_path: Path) -> None:
    make(tmp_path / "private.png", run / "samples" / "1.png")
    (run / "samples" / "2.png").symlink_to(tmp_path / "private.png")
    assert [file.name for file in sample_files(run)] == ["1.png"]
