"""One image, one split, one label: equal bytes and contradicting labels."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convmixer.data.datasets import DataSplits
from convmixer.data.splits import find_conflicts
from convmixer.errors import RequestError
from data_sets import label, load, parts, write_folder, write_tar


def contents(data: DataSplits) -> list[set[bytes]]:
    """Return the pixels of each split."""
    sets = [part for part in (data.train, data.val, data.test) if part]
    return [{part[i][0].tobytes() for i in range(len(part))} for part in sets]


def share_nothing(data: DataSplits) -> bool:
    found = contents(data)
    return sum(map(len, found)) == len(set.union(*found))


def write_csv(root: Path, line: Callable[[int], str], times: int = 1) -> Path:
    write_folder(root / "img", range(60))
    text = "path,label\n" + "".join(line(i) for i in range(60)) * times
    table = root / "table.csv"
    table.write_text(text)
    return table


def test_a_file_named_three_times_stays_in_one_split(tmp_path: Path) -> None:
    data = load(write_csv(tmp_path, lambda i: f"img/{label(i)}/{i:04}.png,{label(i)}\n", times=3))
    assert sum(map(len, parts(data))) == 180
    assert share_nothing(data)
    assert any(
        note.startswith("120 images are copies of others, byte for byte, and stay in one split: ")
        for note in data.notes
    )


def test_copies_in_two_splits_are_not_counted_as_copies_that_stay_together() -> None:
    copies = {"test": np.array([1, 2]), "train": np.array([1, 3, 3, 4])}
    labels = {split: np.zeros(len(numbers), np.int64) for split, numbers in copies.items()}
    notes = find_conflicts(copies, labels, lambda split, i: f"{split} {i}").notes
    assert notes == [
        "1 images are copies of others, byte for byte, and stay in one split: train 1 = train 2, train 2 = train 1",
        "1 images are in two splits: kept in test: train 0 = test 0",
    ]


def test_a_file_of_two_labels_is_refused(tmp_path: Path) -> None:
    table = write_csv(tmp_path, lambda i: f"img/{label(i)}/{i:04}.png,{label(i)}\nimg/{label(i)}/{i:04}.png,wet\n")
    with pytest.raises(RequestError, match=r"120 of 120 images cannot be used.*0000\.png: an identical image has a"):
        load(table)


def test_few_images_of_two_labels_are_left_out_and_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path, range(100))
    shutil.copy(root / label(0) / "0000.png", root / label(1) / "copy.png")
    with pytest.raises(RequestError, match="2 of 101 images cannot be used"):
        load(root)
    data = load(root, bad=0.05)
    assert sum(map(len, parts(data))) == 99
    assert sorted(name.split(":")[0] for name in data.bad_files) == [f"{label(0)}/0000.png", f"{label(1)}/copy.png"]


def test_copies_in_two_splits_stay_in_the_one_that_measures(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", range(60))
    write_folder(tmp_path / "test", range(50, 80))  # ten of them are in train too
    data = load(tmp_path)
    assert len(parts(data)[2]) == 30
    assert share_nothing(data)
    assert any(note.startswith("10 images are in two splits: kept in test: ") for note in data.notes)


def test_copies_in_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", range(60))
    write_tar(tmp_path / "test.tar", range(50, 80))
    data = load(tmp_path)
    assert len(parts(data)[2]) == 30
    assert share_nothing(data)


def test_long_files_that_begin_alike_are_no_copies(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    from PIL import Image

    noise = rng.integers(0, 255, (100, 100, 3), dtype=np.uint8)
    for i in range(30):
        folder = tmp_path / f"class {i % 2}"
        folder.mkdir(exist_ok=True)
        noise[-1] = i  # the last row alone
        Image.fromarray(noise).save(folder / f"{i}.bmp")
    data = load(tmp_path)
    assert sum(map(len, parts(data))) == 30
    assert not any("copies" in note for note in data.notes)
