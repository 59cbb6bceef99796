"""One image, one split, one label: equal bytes, contradicting labels, and groups that stay together."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convmixer.data.datasets import DataSplits
from convmixer.data.options import Options
from convmixer.data.splits import stratified
from convmixer.errors import RequestError
from data_sets import label, load, names, parts, png, write_folder, write_tar


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


# groups


def test_groups_by_pattern_and_by_column(tmp_path: Path) -> None:
    for i in range(120):
        folder = tmp_path / "img" / f"class {i // 10 % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"video{i // 10:02}_{i % 10}.png").write_bytes(png(i))
    rows = [
        f"img/class {i // 10 % 2}/video{i // 10:02}_{i % 10}.png,class {i // 10 % 2},p{i // 20}" for i in range(120)
    ]
    (tmp_path / "table.csv").write_text("\n".join(["path,label,patient", *rows]))

    def videos(data: DataSplits, length: int = 7) -> list[set[str]]:
        return [{Path(name).name[:length] for name in names(part)} for part in parts(data)]

    data = load(tmp_path / "img", options=Options(group=r"(video\d+)_"))
    found = videos(data)
    assert sum(map(len, found)) == len(set.union(*found)) == 12
    assert "12 groups, each in one split" in data.notes
    assert [len(part) for part in parts(data)] == [70, 20, 30] or sum(map(len, parts(data))) == 120
    patients = load(tmp_path / "table.csv", options=Options(group="patient"))
    pairs = [{int(name[5:]) // 2 for name in part} for part in videos(patients)]
    assert sum(map(len, pairs)) == len(set.union(*pairs)) == 6


def test_groups_that_cannot_be(tmp_path: Path) -> None:
    write_folder(tmp_path, range(60))
    with pytest.raises(RequestError, match=r"--group 'patient' is neither a column nor .* a path, such as 'digit 0/"):
        load(tmp_path, options=Options(group="patient"))
    with pytest.raises(RequestError, match="nor a valid regular expression"):
        load(tmp_path, options=Options(group="("))
    write_folder(tmp_path / "s" / "train", range(60))
    write_folder(tmp_path / "s" / "test", range(60, 90))
    with pytest.raises(RequestError, match=r"group '00' is in .* own splits separate images"):
        load(tmp_path / "s", options=Options(group=r"/(00)\d\d"))


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_whole_groups_are_held_out(fraction: float) -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 100, 1000)
    labels = groups % 4
    held = stratified(labels, fraction, 0, groups)
    assert not set(groups[held]) & set(groups[~held])
    assert abs(held.mean() - fraction) < 0.03
    assert (stratified(labels, fraction, 0, groups) == held).all()
    single = np.arange(1000)
    assert (stratified(labels, fraction, 3, single) == stratified(labels, fraction, 3)).all()
