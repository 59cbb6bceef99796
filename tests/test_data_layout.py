"""Which folders are splits and which are classes, judged only by names and structure."""

import pytest

from convmixer.data.labels import split_of
from convmixer.data.layout import NO_CLASS, NO_CLASS_FOLDERS, NO_SPLIT, Layout, arrange
from convmixer.errors import RequestError


def layout(text: str) -> Layout:
    """Return the layout of folders with ten images each, or as many as an "=N" says."""
    pairs = [part.partition("=") for part in text.split()]
    return arrange({tuple(path.split("/")) if path != "." else (): int(count or 10) for path, _, count in pairs})


def placed(text: str) -> dict[str, str]:
    """Return "split:class" or the reason for each folder."""
    found = layout(text)
    out = {}
    for part in text.split():
        path = part.partition("=")[0]
        place = found.place(tuple(path.split("/")) if path != "." else ())
        out[path] = place if isinstance(place, str) else f"{place[0]}:{place[1][0]}"
    return out


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"), ("Training", "train"), ("training_set", "train"), ("seg_train", "train"),
        ("trainset", "train"), ("TrainImages", "train"), ("train2017", "train"), ("valid", "val"), ("eval", "val"),
        ("dev-set", "val"), ("val_256", "val"), ("test_set", "test"), ("PublicTest", "test"), ("testing", "test"),
    ],
)  # fmt: skip
def test_names_of_splits(name: str, split: str) -> None:
    assert split_of(name) == (split, True)


@pytest.mark.parametrize("name", ["test tube", "freight_train", "dev board"])
def test_names_that_are_perhaps_splits(name: str) -> None:
    assert split_of(name)[0]
    assert not split_of(name)[1]


@pytest.mark.parametrize("name", ["trainer", "contest", "valley", "device", "train_val", "seg_pred", "", "2017"])
def test_names_of_no_split(name: str) -> None:
    assert split_of(name) == ("", False)


def test_class_folders() -> None:
    assert placed("cat dog/2019 dog/2020 .") == {
        "cat": "train:cat", "dog/2019": "train:dog", "dog/2020": "train:dog", ".": NO_CLASS,
    }  # fmt: skip


def test_splits_by_words_in_their_names() -> None:
    assert placed("training_set/cat training_set/dog test_set/cat test_set/dog") == {
        "training_set/cat": "train:cat", "training_set/dog": "train:dog",
        "test_set/cat": "test:cat", "test_set/dog": "test:dog",
    }  # fmt: skip
    assert layout("training_set/cat test_set/cat").notes == ["splits: train is training_set, test is test_set"]
    assert placed("train/cat train/dog eval/cat") == {
        "train/cat": "train:cat", "train/dog": "train:dog", "eval/cat": "val:cat",
    }  # fmt: skip


def test_wrappers_are_stepped_into() -> None:
    nested = "scenes/seg_train/seg_train/sea scenes/seg_train/seg_train/ice scenes/seg_test/seg_test/sea"
    found = placed(f"{nested} scenes/seg_pred/seg_pred")
    assert set(found.values()) == {"train:sea", "train:ice", "test:sea", NO_SPLIT}
    assert found["scenes/seg_pred/seg_pred"] == NO_SPLIT
    assert placed("flowers/rose flowers/lily")["flowers/rose"] == "train:rose"
    assert layout("flowers/rose flowers/lily").notes == ["the class folders are in flowers"]
    assert placed("train/images/cat train/images/dog test/images/cat")["test/images/cat"] == "test:cat"


def test_one_class_with_folders_in_it_stays_a_class_of_the_split() -> None:
    found = placed("train/cat/old train/cat/new train/dog/old train/dog/new test/cat/old test/cat/new")
    assert set(found.values()) == {"train:cat", "train:dog", "test:cat"}


def test_splits_in_class_folders() -> None:
    found = placed("cat/train cat/test dog/train dog/test fox/train")
    assert found == {
        "cat/train": "train:cat", "cat/test": "test:cat", "dog/train": "train:dog", "dog/test": "test:dog",
        "fox/train": "train:fox",
    }  # fmt: skip


def test_what_could_be_splits_or_classes_is_asked_about() -> None:
    with pytest.raises(RequestError, match=r"early, late all contain the folders cat, dog: if they are splits"):
        layout("early/cat early/dog late/cat late/dog")
    assert placed("cat/images dog/images")["dog/images"] == "train:dog"
    with pytest.raises(RequestError, match="train may be a split, or a class like car, bus"):
        layout("car bus train/steam train/diesel=5")
    assert placed("train/cat=50 train/dog=50 test/cat more=500 extra")["more"] == NO_SPLIT


def test_a_class_may_have_a_split_in_its_name() -> None:
    assert placed("freight_train car bus")["freight_train"] == "train:freight_train"
    assert placed("test_tube/small test_tube/large flask/small beaker")["test_tube/small"] == "train:test_tube"


def test_splits_without_class_folders() -> None:
    assert placed("cat dog test_set")["test_set"] == NO_CLASS_FOLDERS
    assert placed("train/n01/images train/n02/images val/images test/images") == {
        "train/n01/images": "train:n01", "train/n02/images": "train:n02",
        "val/images": NO_CLASS_FOLDERS, "test/images": NO_CLASS_FOLDERS,
    }  # fmt: skip
    assert set(placed("train test").values()) == {NO_CLASS_FOLDERS}


def test_two_folders_of_one_split_are_refused() -> None:
    with pytest.raises(RequestError, match="val and valid_set are both the val split"):
        layout("train/cat val/cat valid_set/cat")
