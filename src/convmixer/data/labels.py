"""Recognises names of classes and splits, and refuses names that could mean two things."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from convmixer.errors import RequestError

SPLIT_WORDS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val", "evaluation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
# other words in the name of a split: training_set, seg_train, test-images-2
FILLERS = {
    "set", "sets", "data", "dataset", "image", "images", "img", "imgs", "picture", "pictures", "photo", "photos",
    "split", "folder", "seg", "files", "public", "private", "labels", "label", "small", "full",
}  # fmt: skip
NO_LABEL = {"", "nan", "<na>", "null", "n/a", "#n/a"}


def split_of(name: str) -> tuple[str, bool]:
    """Return the split that a word of a name means, or "", and whether the name is sure to mean it.

    `training_set`, `seg_train`, `TestSet` and `val2017` are sure; `test tube` and `freight_train` are not.
    """
    words = [word for word in re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()) if word]
    short = [next((w for end in FILLERS if (w := word.removesuffix(end)) in SPLIT_WORDS), word) for word in words]
    splits = {SPLIT_WORDS[word] for word in short if word in SPLIT_WORDS}
    if len(splits) != 1:
        return "", False
    return splits.pop(), all(word in FILLERS or word in SPLIT_WORDS for word in short)


def by_split(files: Sequence[Path], root: Path) -> dict[str, list[Path]]:
    """Return files by the split that a word of their path names (train-0.parquet, x_val.tar), else all as train.

    Raises:
        RequestError: Some names hold a split, others do not.
    """
    groups: dict[str, list[Path]] = {}
    for file in files:
        parts = (file.name,) if file == root else file.relative_to(root).parts
        splits = [split for part in parts[::-1] if (split := split_of(part)[0])]
        groups.setdefault(splits[0] if splits else "", []).append(file)
    unnamed = groups.pop("", [])
    if unnamed and groups:
        raise RequestError(
            f"{unnamed[0]}: its name contains no split (train, val, test), but names of other files do"
        )
    return groups or {"train": unnamed}


def is_label(text: str) -> bool:
    """Return whether a text can be the name of a class: it is not empty, and does not mean a missing value."""
    return text.strip().lower() not in NO_LABEL


def encode_labels(labels: Mapping[str, Sequence[str]]) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Return class names in order (by number if all are numbers) and int64 labels per split.

    Names are compared, and returned, in Unicode's composed form (NFC).

    Raises:
        RequestError: A class is in another split but not in train, or two names look the same.
    """
    spellings = {name for split in labels.values() for name in split}
    tidy = {name: tidy_name(name) for name in spellings}
    check_names(sorted(spellings))
    known = {tidy[name] for name in labels.get("train") or spellings}
    numbers = all(re.fullmatch(r"-?\d+", name) for name in known)
    classes = sorted(known, key=lambda name: (int(name), name)) if numbers else sorted(known)  # "01" equals "1"
    index = {name: i for i, name in enumerate(classes)}
    for split, names in labels.items():
        if missing := sorted({tidy[name] for name in names} - known):
            raise RequestError(
                f"class {missing[0]!r} is in {split} but has no image in train"
                + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
            )
    return tuple(classes), {s: np.array([index[tidy[n]] for n in names], np.int64) for s, names in labels.items()}


def tidy_name(name: str) -> str:
    """Return the name of a class without spaces around it, in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", name).strip()


def check_names(names: Sequence[str]) -> None:
    """Raise RequestError if a name is empty, or two of the names look the same when written."""
    seen: dict[str, str] = {}
    for name in names:
        if not name.strip():
            raise RequestError(f"a class has the name {name!r}: a name needs letters or digits")
        if (known := seen.setdefault(tidy_name(name), name)) is not name:
            how = "are equal" if known == name else "differ only in Unicode normalisation or in spaces"
            raise RequestError(f"two class names {known!r} and {name!r} {how}: rename one, or join the classes")


def names_that_differ_in_case(names: Iterable[str]) -> list[str]:
    """Return a note for class names that differ only in capitals."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.casefold(), []).append(name)
    same = [group for group in groups.values() if len(group) > 1]
    return [f"classes {' and '.join(map(repr, group))} differ only in capitals" for group in same[:5]]
