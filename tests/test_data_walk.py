"""Finding files: links, hidden files, convmixer's own folders and depth. All commands see the same files."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from convmixer.cli import main
from convmixer.data import walk as walker
from convmixer.data.walk import HIDDEN, LEADS_OUT, NOT_ORDINARY, OWN_OUTPUT, READ_ALREADY, TOO_DEEP, walk
from convmixer.errors import RequestError
from convmixer.models.weights import load_model
from convmixer.predict.sources import expand
from data_sets import load, names, parts, png, write_folder


def images_of(root: Path) -> set[str]:
    """Return the paths of all images that training uses."""
    data = load(root, 0)
    return {os.path.realpath(root / name) for part in (data.train, data.test) if part for name in names(part)}


def test_hidden_files_are_passed_over_and_counted(tmp_path: Path) -> None:
    write_folder(tmp_path, range(60))
    for name in (
        "digit 1/.ipynb_checkpoints/0001-checkpoint.png",
        "digit 1/._0001.png",
        "__MACOSX/digit 1/a.png",
        "digit 1/@eaDir/0001.png/SYNOPHOTO_THUMB_M.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(0))
    walked = walk(tmp_path)
    assert len(walked.files) == 60
    assert set(walked.unused.names[HIDDEN]) == {
        "__MACOSX",
        "digit 1/.ipynb_checkpoints",
        "digit 1/._0001.png",
        "digit 1/@eaDir",
    }
    assert (
        f"not used, {HIDDEN}: 4 (__MACOSX, digit 1/._0001.png, digit 1/.ipynb_checkpoints, digit 1/@eaDir)"
        in load(tmp_path).notes
    )


def test_links_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", range(60, 100))  # no copies: those would be left out
    root = write_folder(tmp_path / "data", range(60))
    for folder, target in (
        ("digit 0", "digit 1"),
        ("digit 1", "digit 0"),
    ):
        (root / folder / "more").symlink_to(f"../{target}")
    (root / "apart").symlink_to(tmp_path / "elsewhere")
    (root / "apart again").symlink_to(tmp_path / "elsewhere" / "digit 3")
    (root / "digit 2" / "up").symlink_to("..")
    (root / "digit 2" / "far up").symlink_to("/")
    (root / "digit 2" / "self").symlink_to(".")
    walked = walk(root)
    assert len(walked.files) == 100
    assert set(walked.unused.names[READ_ALREADY]) == {
        "digit 0/more", "digit 1/more", "apart again", "digit 2/self",
    }  # fmt: skip
    assert set(walked.unused.names[LEADS_OUT]) == {"digit 2/up", "digit 2/far up"}
    assert walked.files == sorted(walked.files)


def test_the_order_does_not_depend_on_links(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", range(60))
    before = walk(root).files
    shutil.move(root / "digit 3", tmp_path / "three")
    (root / "digit 3").symlink_to(tmp_path / "three")
    assert walk(root).files == before


def test_predict_and_train_see_the_same_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", range(60, 100))  # no copies: those would be left out
    root = write_folder(tmp_path / "data", range(60))
    (root / "digit 4" / "2024").symlink_to(tmp_path / "elsewhere")
    (root / "digit 4" / "._a.png").write_bytes(b"\0\5\x16\7")
    (root / "digit 5" / "lost.png").symlink_to("nowhere.png")
    files, unused = expand([root])
    assert len(files) == 101
    found = {os.path.realpath(file) for file in files if file.name != "lost.png"}
    data = load(root, 0, bad=0.1)
    trained = {os.path.realpath(root / name) for part in (data.train, data.test) if part for name in names(part)}
    assert trained == found
    assert unused.counts == {HIDDEN: 1}


def test_what_convmixer_wrote_is_no_data(tmp_path: Path) -> None:
    root = write_folder(tmp_path, range(60))
    before = load(root)
    for run in (root / "runs" / "finetune-1", root / "mine"):
        (run / "samples").mkdir(parents=True)
        (run / "samples" / "0.png").write_bytes(png(0))
        (run / "config.yaml").write_text("command: convmixer train .\n")
    data = load(root)
    assert (data.classes, data.checksum) == (before.classes, before.checksum)
    assert [names(part) for part in parts(data)] == [names(part) for part in parts(before)]
    assert f"not used, {OWN_OUTPUT}: 2 (mine, runs)" in data.notes
    assert len(expand([root])[0]) == 60


@contextlib.contextmanager
def deep_folder(root: Path, depth: int) -> Iterator[None]:
    """Make a folder too deep for most programs, which would fail to delete it: it is removed from the inside."""
    here = os.getcwd()
    os.chdir(root)
    for _ in range(depth):
        os.mkdir("deep")
        os.chdir("deep")
    bottom = os.open(".", os.O_RDONLY)
    os.chdir(here)
    try:
        yield
    finally:
        os.fchdir(bottom)
        os.close(bottom)
        for _ in range(depth):
            os.chdir("..")
            os.rmdir("deep")
        os.chdir(here)


def test_depth_is_bounded(tmp_path: Path) -> None:
    write_folder(tmp_path, range(60))
    with deep_folder(tmp_path, 1200):
        assert sum(len(part) for part in parts(load(tmp_path))) == 60
        walked = walk(tmp_path)
    assert walked.unused.counts[TOO_DEEP] == 1
    assert len(walked.unused.notes()[0]) < 300


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    write_folder(tmp_path, range(60))
    os.mkfifo(tmp_path / "digit 0" / "pipe.png")
    data = load(tmp_path)
    assert sum(len(part) for part in parts(data)) == 60
    assert f"not used, {NOT_ORDINARY}: 1 (digit 0/pipe.png)" in data.notes


def test_a_folder_whose_reading_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, range(20))
    real = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("digit 3"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(walker.os, "scandir", scandir)
    with pytest.raises(RequestError, match=r"cannot read .*digit 3: Permission denied"):
        walk(tmp_path)


def test_a_run_inside_its_own_data_is_continued_and_trained_again_on_the_same_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "flowers", range(60))
    monkeypatch.chdir(root)
    settings = ["--model", "convmixer_8_1_p2_k3", "--img-size", "8", "--workers", "0", "--draw", "false"]
    assert main(["train", ".", *settings, "--epochs", "1", "--out", "runs/first"]) == 0
    assert main(["train", "--resume", "runs/first", "--epochs", "2"]) == 0
    assert main(["train", ".", *settings, "--epochs", "1"]) == 0
    assert "have changed" not in capsys.readouterr().out
    (second,) = (run for run in (root / "runs").iterdir() if run.name != "first")
    found = [load_model(root / "runs" / name).classes for name in ("first", second.name)]
    assert found[0] == found[1] == tuple(sorted(p.name for p in root.iterdir() if p.name.startswith("digit")))
