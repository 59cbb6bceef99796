"""Parquet files that do not agree: on the order of classes, on their columns, on types; and their split columns."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convmixer.data.options import Options
from convmixer.errors import RequestError
from data_sets import load, png


def write(path: Path, first: int, names: list[str] | None, **columns: Any) -> None:
    """Write as many scans as there are labels, from number `first` on."""
    images = [png(i) for i in range(first, first + len(columns["label"]))]
    table = pa.table({"image": images} | columns)
    if names:
        described = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
    pq.write_table(table, path)


def test_each_file_numbers_the_classes_in_its_own_order(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", 0, ["cat", "dog"], label=[0, 1] * 10)
    write(tmp_path / "train-1.parquet", 20, ["dog", "cat"], label=[0, 0, 1, 0])
    write(tmp_path / "test-0.parquet", 40, ["dog"], label=[0, 0])
    data = load(tmp_path, hold_out=False)
    assert data.classes == ("cat", "dog")
    assert data.train is not None
    assert data.test is not None
    assert data.train.labels.tolist() == [0, 1] * 10 + [1, 1, 0, 1]
    assert data.test.labels.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("names", "labels", "reason"),
    [
        (["ant", "cat"], [0, 1], "test.parquet has the class 'ant', which .*train.parquet does not have"),
        (["dog"], [0, 1], "test.parquet has label 1 but only 1 class names"),
        (None, [0, 1], "train.parquet names its classes, .*test.parquet only numbers them"),
        (["cat", "dog"], ["a", "b"], "do not fit together"),
        (["cat", "dog"], [0.5, 1.5], "do not fit together|whole numbers"),
    ],
)
def test_files_that_do_not_fit_together(tmp_path: Path, names: list[str] | None, labels: Any, reason: str) -> None:
    write(tmp_path / "train.parquet", 0, ["cat", "dog"], label=[0, 1] * 10, split=["train"] * 20)
    write(tmp_path / "test.parquet", 40, names, label=labels, split=["test"] * 2)
    with pytest.raises(RequestError, match=reason) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_column_that_one_file_lacks(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", 0, None, label=[0, 1] * 10, kind=["a", "b"] * 10)
    write(tmp_path / "train-1.parquet", 40, None, label=[0, 1])
    with pytest.raises(RequestError, match=r"train-1.parquet has no column 'kind', which .*train-0.parquet has"):
        load(tmp_path, options=Options(label_column="kind"))


@pytest.mark.parametrize(
    ("column", "cells", "counts"),
    [
        ("set", ["train", "train", "val", "test"], [30, 15, 15]),
        ("is_valid", [False, False, False, True], [45, 15]),
        ("Usage", ["a", "b", "train", "test"], None),
        ("origin", ["train", "val", "train", "test"], [30, 15, 15]),
        ("fold", [0, 1, 2, 3], None),
    ],
)
def test_columns_that_say_the_split(tmp_path: Path, column: str, cells: list[Any], counts: list[int] | None) -> None:
    write(tmp_path / "all.parquet", 0, None, label=[0, 1, 1, 0] * 15, **{column: cells * 15})
    data = load(tmp_path, hold_out=False)
    assert [len(part) for part in (data.train, data.val, data.test) if part] == (counts or [60])
    assert any("not used, a column of the table: 1" in note for note in data.notes) == (counts is None)
    assert any(f"--split-column {column}=" in note for note in data.notes) == (counts is None)
    assert any("splits are those of column" in note for note in data.notes) == (column == "origin")


def test_classes_without_images_in_train_are_said(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", 0, ["cat", "dog", "fox"], label=[0, 1] * 20)
    data = load(tmp_path)
    assert "1 of 3 classes have no image in train: 'fox'" in data.notes
