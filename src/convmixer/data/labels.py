"""Recognises names of classes and splits, and refuses names that could mean two things."""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from convmixer.errors import RequestError, shown

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
_NUMBER = re.compile(r"[+-]?\d{1,300}(\.\d*)?", re.ASCII)
_JOINER = "\u200d"  # invisible; joins several emoji into one
UNSURE = {"none", "unknown", "?", "-", "na", "missing", "undefined", "unlabelled", "unlabeled"}  # maybe no label
NO_LABEL = {"", "nan", "<na>", "null", "n/a", "#n/a"}


def split_of(name: str) -> tuple[str, bool]:
    """Return the split that a word of a name means, or "", and whether the name can mean nothing else.

    `training_set`, `seg_train`, `TestSet` and `val2017` are sure; `test tube` and `freight_train` are not.
    """
    words = [word for word in re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()) if word]
    short = [next((w for end in FILLERS if (w := word.removesuffix(end)) in SPLIT_WORDS), word) for word in words]
    splits = {SPLIT_WORDS[word] for word in short if word in SPLIT_WORDS}
    if len(splits) != 1:
        return "", False
    return splits.pop(), all(word in FILLERS or word in SPLIT_WORDS for word in short)


def by_split(files: Sequence[Path], root: Path) -> dict[str, list[Path]]:
    """Return split -> files, by a word of each path (train-0.parquet, x_val.tar); all are train if none has such a
    word.

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
        RequestError: A class is in another split but not in train, two names look the same, or names are lists of
            labels or measured values.
    """
    spellings = {name for split in labels.values() for name in split}
    tidy = {name: tidy_name(name) for name in spellings}
    check_names(sorted(spellings))
    _refuse_lists(set(tidy.values()))
    _refuse_measured(set(tidy.values()), sum(map(len, labels.values())))
    known = {tidy[name] for name in labels.get("train") or spellings}
    numbers = all(_NUMBER.fullmatch(name) for name in known)
    classes = sorted(known, key=lambda name: (Fraction(name), name)) if numbers else sorted(known)
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
        if not (looks := _as_seen(name)):
            raise RequestError(f"a class has the name {name!r}: a name needs letters or digits")
        if (known := seen.setdefault(looks, name)) is not name:
            how = "are equal" if known == name else "differ only in Unicode normalisation or in spaces"
            raise RequestError(f"two class names {known!r} and {name!r} {how}: rename one, or join the classes")


def _as_seen(name: str) -> str:
    """Return what a reader sees of a name: each space alike and single, nothing invisible."""
    visible = "".join(c for c in tidy_name(name) if unicodedata.category(c) != "Cf" or c == _JOINER)
    return " ".join(visible.split())


def _refuse_lists(names: Collection[str]) -> None:
    """Raise RequestError if names list several labels: a;b beside a, or beside b;c; or ['a', 'b']."""
    for name in sorted(names):
        if re.fullmatch(r"\[.*\]|\{.*\}", name, re.DOTALL):
            raise _is_a_list(name)
    for mark in ";|,":
        lists = {name: [part.strip() for part in name.split(mark)] for name in sorted(names) if mark in name}
        places: dict[str, set[int]] = {}
        for parts in lists.values():
            for place, part in enumerate(parts):
                places.setdefault(part, set()).add(place)
        for name, parts in lists.items():
            known = [part in names for part in parts]  # ImageNet has the class "maillot" beside "maillot, tank suit"
            mixed = mark != "," and (any(known) or any(len(places[part]) > 1 for part in parts))
            if all(parts) and (mixed or all(known)):
                raise _is_a_list(name)


def _is_a_list(name: str) -> RequestError:
    return RequestError(
        f"the label {shown(name)!r} looks like several labels: an image has exactly one label here; if it is one "
        "class, write its name otherwise"
    )


def _refuse_measured(names: Collection[str], images: int) -> None:
    """Raise RequestError if the names are measured values: numbers between whole ones, nearly one per image."""
    between = next((name for name in sorted(names) if _NUMBER.fullmatch(name) and Fraction(name) % 1), None)
    if between and all(map(_NUMBER.fullmatch, names)) and 2 * len(names) > images > 2:
        raise RequestError(f"the labels are measured values, such as {between}, not names of classes")


def doubtful_names(names: Collection[str]) -> list[str]:
    """Return notes for names of classes that could be meant as one, or as several labels."""
    folded = [f"{some} differ only in capitals" for some in _alike(names, str.casefold)]
    numbers = [name for name in names if _NUMBER.fullmatch(name)]
    equal = [f"{some} are the same number" for some in _alike(numbers, Fraction)]
    known = set(names)
    made = [name for name in names if len(parts := name.split()) > 1 and known.issuperset(parts)]
    several = [f"class {name!r} is taken as one class, not as several labels" for name in made[:5]]
    empty = [name for name in names if name.lower() in UNSURE]
    return folded + equal + several + [f"{name!r} is taken as a class, not as a missing label" for name in empty]


def _alike(names: Iterable[str], key: Callable[[str], object]) -> list[str]:
    """Return the first groups of names with the same key, in words."""
    groups: dict[object, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    same = [group for group in groups.values() if len(group) > 1]
    return [f"classes {' and '.join(map(repr, group))}" for group in same[:5]]
