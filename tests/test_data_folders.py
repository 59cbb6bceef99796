"""Image folders, with real images: which folders are splits and classes, and the notes on the rest."""

import os
from pathlib import Path

import pytest

from convmixer.errors import RequestError
from data_sets import PHOTO, label, load, parts, pixels, png, write_folder, write_parquet


def test_folder_without_splits(tmp_path: Path) -> None:
    data = load(write_folder(tmp_path, range(200)))
    train, val, test = parts(data)
    assert (len(train), len(val), len(test)) == (128, 32, 40)
    assert data.classes == tuple(f"digit {i}" for i in range(10))
    assert "train 128, val 32, test 40 images" in data.notes
    assert pixels(train)[0] != pixels(val)[0]
    assert (data.img_size, data.in_chans, len(data.mean)) == (8, 1, 1)
    assert all(train.name(i).startswith(data.classes[train.labels[i]]) for i in range(len(train)))


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_folder_with_splits(tmp_path: Path, name: str) -> None:
    for split, indices in (("train", range(60)), (name, range(60, 90)), ("test", range(90, 120))):
        write_folder(tmp_path / split, indices)
    (tmp_path / "train" / "notes.txt").write_text("hello")
    data = load(tmp_path)
    assert [len(part) for part in parts(data)] == [60, 30, 30]
    assert any("notes.txt" in note for note in data.notes)


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    for split, indices in (("train", range(60)), ("val", range(60, 90)), ("Validation", range(90, 120))):
        write_folder(tmp_path / split, indices)
    with pytest.raises(RequestError, match="Validation and val are both the val split: put them together"):
        load(tmp_path)
    (tmp_path / "Validation").rename(tmp_path / "more")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "loose.png").write_bytes(png(0))
    data = load(tmp_path)  # no class folders in one of them: not used, and the run says so
    assert len(parts(data)[1]) == 30
    assert "not used, a split without class folders: 1 (dev/loose.png)" in data.notes


def test_what_is_odd_is_said(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", range(60))
    (tmp_path / "train" / "nothing").mkdir()
    (tmp_path / "val" / "empty").mkdir(parents=True)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "loose.png").write_bytes(png(0))
    notes = " | ".join(load(tmp_path).notes)
    for part in (
        "a split without class folders: 1 (test/loose.png)",
        "a folder without images: 2 (train/nothing, val/empty)",
        "no val split",
    ):
        assert part in notes
    write_folder(tmp_path / "one" / "scans", range(0, 60, 10)[:1])
    PHOTO.save(tmp_path / "one" / "scans" / "photo.png")
    PHOTO.save(tmp_path / "one" / "scans" / "photo.jpg")
    data = load(tmp_path / "one", 0)
    assert (data.img_size, data.in_chans, data.mean) == (224, 3, (0.485, 0.456, 0.406))
    assert "only one class, 'scans'" in " ".join(data.notes)
    assert "images differ in size: used at 224" in " ".join(data.notes)


@pytest.mark.parametrize(
    ("more", "hint"),
    [
        (["val.csv", "train.csv"], r"to take the labels from a table, give .*: .*train\.csv"),
        (["labels.txt"], r"labels\.txt is not read: make a table of it, a \.csv with a row path,label"),
        (["images.zip"], r"images\.zip is a compressed archive: unpack it"),
        (["annotations/trimaps/a.png"], r"the folder 'annotations' names no class"),
    ],
)
def test_a_folder_called_images_is_no_class(tmp_path: Path, more: list[str], hint: str) -> None:
    for name in ("images/1.png", "images/2.png", *more):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(0))
    with pytest.raises(RequestError, match=hint) as error:
        load(tmp_path)
    assert "names no class" in str(error.value)


def test_what_class_folders_hold_beside_images_is_said(tmp_path: Path) -> None:
    write_folder(tmp_path, range(60))
    for name in ("digit 0/left/a.png", "digit 1/right/b.png", "digit 1/right/b_mask.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(100 + len(name)))
    (tmp_path / "test_list.txt").write_text("digit 0/0000.png\n")
    notes = load(tmp_path).notes
    assert "2 folders inside class folders count as their class: digit 0/left, digit 1/right" in notes
    assert "1 images are named like masks of others, but count as images: digit 1/right/b_mask.png" in notes
    assert "not used, a list of images, labels or splits; to use it, make a table of it: 1 (test_list.txt)" in notes


def test_loose_test_images_beside_class_folders_are_no_class(tmp_path: Path) -> None:
    write_folder(tmp_path, range(90))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "unknown.png").write_bytes(png(0))
    data = load(tmp_path)
    assert data.classes == tuple(f"digit {i}" for i in range(10))
    assert "not used, a split without class folders: 1 (test/unknown.png)" in data.notes
    assert not any("without images" in note for note in data.notes)


@pytest.mark.parametrize("split", [False, True])
def test_a_stray_archive_beside_class_folders_is_ignored(tmp_path: Path, split: bool) -> None:
    for name, indices in (("train", range(60)), ("test", range(60, 90))):
        write_folder(tmp_path / name if split else tmp_path, indices)
    expected = load(tmp_path)
    (tmp_path / "backup.tar").write_bytes(b"anything")
    write_parquet(tmp_path / "more.parquet", range(90, 120))
    data = load(tmp_path)
    assert (data.classes, data.checksum) == (expected.classes, expected.checksum)
    assert [pixels(part) for part in parts(data)] == [pixels(part) for part in parts(expected)]
    for stray in ("backup.tar", "more.parquet"):
        assert any("(the images are in folders): 2" in note and stray in note for note in data.notes)


def test_pictures_beside_parquet_are_no_class_folder(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", range(60))
    (tmp_path / "assets").mkdir()
    PHOTO.save(tmp_path / "assets" / "readme.png")
    assert load(tmp_path).classes == tuple(f"digit {i}" for i in range(10))


def test_odd_names_and_links_that_lead_back(tmp_path: Path) -> None:
    write_folder(tmp_path, range(60))
    (tmp_path / label(0) / "all").symlink_to(tmp_path)
    (tmp_path / label(1) / "self").symlink_to(".")
    (tmp_path / label(2) / os.fsdecode(b"fl\xe9ur.png")).write_bytes(png(2))  # not UTF-8
    assert sum(len(part) for part in parts(load(tmp_path))) == 61


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, range(60))
    (tmp_path / label(0)).chmod(0)
    with pytest.raises(RequestError, match=f"cannot read .*{label(0)}: Permission denied"):
        load(tmp_path)
