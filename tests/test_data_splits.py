"""How data are split: stratified, the same on every reading, and made from train if a split is missing."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from convmixer.data.splits import stratified
from data_sets import DIGITS, PHOTO, load, names, parts, write_folder


def test_digits() -> None:
    data = load("digits", val_fraction=0.1)
    train, val, test = parts(data)
    assert (len(train), len(val), len(test)) == (1293, 144, 360)
    assert (data.img_size, data.in_chans, data.classes) == (8, 1, tuple("0123456789"))
    image, number = test[5]
    where = int(test.name(5)[7:-1])
    assert number == DIGITS.target[where]
    assert np.abs(np.asarray(image) / 255 - DIGITS.images[where] / 16).max() < 0.01


def test_statistics_of_grey_images_hold_one_image_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "scan").mkdir()
    for i in range(30):
        PHOTO.convert("L").rotate(i).resize((500, 500)).save(tmp_path / "scan" / f"{i}.png")
    tracemalloc.start()
    data = load(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    train = parts(data)[0]
    stacked = np.stack([np.asarray(train[i][0]) for i in range(len(train))]) / 255
    assert data.mean == (round(float(stacked.mean()), 4),)
    assert data.std == (round(float(stacked.std()), 4),)
    assert peak < stacked.nbytes / 4


def test_splits_share_no_image_and_test_stays_the_same() -> None:
    first, again, other = load("digits"), load("digits"), load("digits", 0.3, seed=1)
    for data in (first, other):
        train, val, test = (names(part) for part in parts(data))
        assert not train & val | train & test | val & test
        assert len(train | val | test) == 1797
    assert names(parts(first)[1]) == names(parts(again)[1]) != names(parts(other)[1])
    assert names(parts(first)[2]) == names(parts(other)[2])
    assert load("digits", 0).val is None


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.25, 0.5])
def test_splits_are_stratified(fraction: float) -> None:
    labels = np.repeat([0, 1, 2, 3], [1, 7, 100, 892])
    held = stratified(labels, fraction, 0)
    assert held.sum() == int(np.ceil(fraction * 1000))
    for number, count in enumerate(np.bincount(labels)):
        kept = (labels[~held] == number).sum()
        assert kept >= 1
        assert abs(kept - count * (1 - fraction)) <= 1.5
    assert (stratified(labels, fraction, 0) == held).all()
    assert (stratified(labels, fraction, 1) != held).any()


def test_val_serves_as_test_where_nothing_is_selected(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", range(60))
    write_folder(tmp_path / "val", range(60, 90))
    data = load(tmp_path, 0)
    assert (data.val, len(data.test or [])) == (None, 30)
    assert [len(part) for part in parts(load(tmp_path))] == [48, 30, 12]


def test_only_a_test_split_can_be_evaluated(tmp_path: Path) -> None:
    write_folder(tmp_path / "test", range(30))
    data = load(tmp_path)
    assert (data.train, data.val, len(data.test or [])) == (None, None, 30)
