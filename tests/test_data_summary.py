"""`convmixer data`: the numbers, the notes, and a contact sheet with legible names."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convmixer import cli
from convmixer.data.summary import summarise, thumbnails
from convmixer.results.contact_sheet import GAP, SIDE, contact_sheet, label_width
from data_sets import PHOTO, label, load, png, write_folder


def test_the_numbers(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "train", range(60)).parent
    write_folder(root / "test", range(60, 90))
    PHOTO.save(root / "train" / label(0) / "photo.jpg")
    (root / "train" / label(1) / "copy.png").write_bytes(png(1))
    (root / "train" / ".hidden").touch()
    s = summarise(load(root))
    assert [row["name"] for row in s["classes"]] == [f"digit {i}" for i in range(10)]
    for split in ("train", "val", "test"):
        assert sum(row[split] for row in s["classes"]) == s[split]
    assert s["train"] + s["val"] == 62
    assert (s["test"], s["copies"], s["unreadable"]) == (30, 1, 0)
    assert s["sizes"] == {"smallest": 8, "median": 8, "largest": 64, "different": 2}
    assert s["modes"] == {"L": 91, "RGB": 1}
    assert s["ignored"] == [{"reason": "hidden", "count": 1, "examples": ["train/.hidden"]}]
    assert 1 < s["imbalance"] < 9


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "scans", range(60))
    (root / label(3) / "broken.png").write_text("no image")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "scans", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert (result["unreadable"], result["picture"]) == (1, "scans-classes.png")
    assert "10 classes" in "\n".join(lines)
    with Image.open("scans-classes.png") as picture:
        assert picture.width in [label_width(["digit 0"]) + n * (SIDE + GAP) + GAP for n in range(4, 9)]
    assert cli.main(["data", "scans", "--out", "sheet.txt"]) == 2
    assert "must end in .png" in capsys.readouterr().err


def test_data_that_are_too_few_to_train_on_are_shown_and_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "few", [0, 10])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "few", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out.splitlines()[-1])["notes"]
    assert any("too few to hold out a val split, since train keeps one of each class" in note for note in notes)
    assert cli.main(["train", "few", "--val-fraction", "0", "--test-fraction", "0"]) == 2
    assert "few has only one class, 'digit 0': training needs two or more" in capsys.readouterr().err


def test_the_picture_is_dark_on_white_with_a_row_per_class(tmp_path: Path) -> None:
    data = load(write_folder(tmp_path / "scans", range(60)))
    rows = thumbnails(data, 60, SIDE)
    assert [name for name, _ in rows] == list(data.classes)
    contact_sheet(rows, tmp_path / "sheet.png")
    page = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    assert page.shape[0] == 10 * (SIDE + GAP) + GAP
    for number in range(10):
        name = page[number * (SIDE + GAP) + GAP :][:SIDE, : label_width(data.classes)]
        assert name.min() < 60
        assert np.median(name) == 255


@pytest.mark.parametrize("name", ["a", "W" * 30, "猫" * 20])
def test_no_name_is_cut_and_none_leaves_much_room(name: str, tmp_path: Path) -> None:
    contact_sheet([(name, [Image.new("RGB", (SIDE, SIDE), "black")])], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        dark = np.flatnonzero((np.asarray(picture.convert("L")) < 128).any(axis=0))
    assert 2 <= dark[0] < 60
