"""Names of classes: lists of labels and measured values are refused, and what could be meant otherwise is said."""

from pathlib import Path

import pytest

from convmixer.data.labels import doubtful_names, encode_labels
from convmixer.errors import RequestError
from data_sets import load, png


def test_classes_of_one_number_keep_their_order() -> None:
    spellings = ["0" * zeros + number for zeros in range(9) for number in ("1", "2", "2.0", "10")]
    classes, labels = encode_labels({"train": spellings})
    assert list(classes) == sorted(spellings, key=lambda name: (float(name), name))
    assert [classes[i] for i in labels["train"]] == spellings


@pytest.mark.parametrize(
    "labels",
    [
        ["cat;dog", "cat", "fox", "fox"],
        ["Effusion|Mass", "Mass|Nodule", "Nodule", "Nodule"],
        ["red, green", "red", "green"],
        ["['cat', 'dog']", "['cat']"],
        ["[0, 1]", "[1]"],
    ],
)
def test_a_list_of_labels_is_no_label(labels: list[str]) -> None:
    with pytest.raises(RequestError, match="looks like several labels: an image has exactly one label here"):
        encode_labels({"train": labels})


@pytest.mark.parametrize(
    "labels",
    [
        ["maillot, tank suit", "maillot", "crane, bird", "crane, machine"],  # of ImageNet
        ["Apple|healthy", "Corn|healthy", "Corn|rust"],
        ["0.5", "1.5"] * 10,
        ["001.Albatross", "002.Finch"],
    ],
)
def test_a_name_of_several_parts_is_a_label(labels: list[str]) -> None:
    assert len(encode_labels({"train": labels})[0]) == len(set(labels))
    assert doubtful_names(sorted(set(labels))) == []


@pytest.mark.parametrize("other", ["big\u00a0cat", "big  cat", "big cat\u200b", "big cat "])
def test_names_that_look_alike_are_refused(other: str) -> None:
    with pytest.raises(RequestError, match="differ only in"):
        encode_labels({"train": ["big cat", other]})


def test_measured_values_are_refused() -> None:
    with pytest.raises(RequestError, match=r"measured values, such as 1\.5, not names of classes"):
        encode_labels({"train": ["1.5", "2.25", "3.0"]})


def test_what_could_be_meant_otherwise_is_said() -> None:
    assert doubtful_names(("?", "7", "007", "7.0", "Cat", "cat", "scab", "rust", "scab rust")) == [
        "classes 'Cat' and 'cat' differ only in capitals",
        "classes '7' and '007' and '7.0' are the same number",
        "class 'scab rust' is taken as one class, not as several labels",
        "'?' is taken as a class, not as a missing label",
    ]


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("0,dog\n1,cat\n2,dog\n3,cat\n", ("cat", "dog")),  # ids, and no header
        ("a,b\n0,dog\n1,cat\n2,dog\n3,cat\n", ("cat", "dog")),
        ("pic,0,1\n0.png,1,0\n1.png,0,1\n2.png,1,0\n3.png,0,1\n", ("0", "1")),
        ("id,label,label\n0,dog,dog\n1,cat,cat\n2,dog,dog\n3,cat,cat\n", ("cat", "dog")),
    ],
)
def test_the_first_row_of_a_table_is_a_header_if_it_is_one(
    tmp_path: Path, text: str, classes: tuple[str, ...]
) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / "t.csv").write_text(text)
    data = load(tmp_path / "t.csv", hold_out=False)
    assert data.classes == classes
    assert data.train is not None
    assert len(data.train) == 4


def test_two_columns_of_one_name_are_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "t.csv").write_text("id,label,label\n0,dog,1\n0,dog,2\n")
    with pytest.raises(RequestError, match="2 columns are called 'label': rename them"):
        load(tmp_path / "t.csv")
