"""Finds the path, label and split columns of a table by name and content, without guessing."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from convmixer.data.csv_file import Rows, normal
from convmixer.data.labels import is_label, split_of
from convmixer.data.located import Location, Locator
from convmixer.data.options import Options, flag
from convmixer.errors import RequestError, shown, unknown
from convmixer.preprocess import SUFFIXES

PATHS = (
    "path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "img_path",
    "image_id", "img_id", "id", "image_name", "img_name", "image_file", "photo", "picture", "fname", "relative_path",
)  # fmt: skip
LABELS = (
    "label", "labels", "class", "target", "category", "class_name", "classname", "class_label", "label_name", "y",
    "species", "breed",
)  # fmt: skip
SPLITS = ("split", "subset", "partition", "set", "phase", "usage")
FLAGS = {  # name of a column of true and false -> the split that true means
    "is_valid": "val", "is_val": "val", "is_validation": "val", "valid": "val",
    "is_test": "test", "is_train": "train",
}  # fmt: skip
FOLDS = ("fold", "folds", "kfold", "k_fold")
KNOWN = {*PATHS, *LABELS, *SPLITS, *FLAGS, *FOLDS}
TRUTHS = {"true": True, "1": True, "yes": True, "1.0": True, "false": False, "0": False, "no": False, "0.0": False}


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are used.

    Args:
        path, split: Indices of the columns of paths and of splits; split is None if all rows are train.
        location: How the paths are resolved.
        labels: The label of each row.
        label: Index of the label column; None if there is one column per class.
        split_value: The value of the split column that means val; None: its values are names of splits.
        notes: How the table was read, if the names of the columns do not say it.
        classes: Indices of the columns that stand for one class each.
        weight, group: Indices of the columns of weights and of groups, or None.
    """

    path: int
    location: Location
    labels: list[str]
    label: int | None
    split: int | None = None
    split_value: str | None = None
    notes: list[str] = field(default_factory=list)
    classes: tuple[int, ...] = ()
    weight: int | None = None
    group: int | None = None

    def used(self) -> set[int]:
        """Return the indices of the columns that are used."""
        return {self.path, *self.classes} | {
            n for n in (self.label, self.split, self.weight, self.group) if n is not None
        }


def choose_columns(rows: Rows, locator: Locator, options: Options) -> Columns:
    """Return the columns of a table.

    Raises:
        RequestError: A column cannot be found without guessing; the message names the flag to give.
    """
    split, value = _split_column(rows, options)
    weight = _by_name(rows, "weight_column", options.weight_column) if options.weight_column else None
    group = _by_name(rows, "group", options.group) if options.group in rows.names and options.group else None
    path, location = _path_column(rows, locator, options, {split, weight})
    taken = {path, split, weight, group}
    notes = []
    if not rows.has_header and len(rows.names) > 2 and split is None and options.split_column is None:
        split = next((n for n in range(len(rows.names)) if n not in taken and holds_splits(rows.column(n))), None)
        taken.add(split)
    label, classes = _label_column(rows, options, taken)
    if label is not None and normal(rows.names[label]) not in LABELS and rows.has_header:
        notes.append(f"labels are those of column {rows.names[label]!r}")
    if classes:
        notes.append(f"each label is the column with a 1: {', '.join(rows.names[n] for n in classes[:5])}, ...")
        labels = [next(rows.names[n] for n in classes if _is_one(row[n])) for row in rows.cells]
    else:
        assert label is not None
        labels = rows.column(label)
    if (note := location.note(next(text for text in rows.column(path) if text))) is not None:
        notes.append(note)
    if split is not None and rows.has_header and not options.split_column and not may_split(rows.names[split]):
        notes.append(f"splits are those of column {rows.names[split]!r}")
    taken |= {label, *classes}
    others = {name: rows.column(n) for n, name in enumerate(rows.names) if may_split(name) and n not in taken}
    notes += fold_notes({name: next(filter(None, cells), "") for name, cells in others.items()})
    return Columns(path, location, labels, label, split, value, notes, classes, weight, group)


def may_split(name: str) -> bool:
    """Return whether a column's name says that its values divide the images, into folds or splits."""
    return normal(name) in (*FOLDS, *SPLITS, *FLAGS)


def fold_notes(unused: Mapping[str, str]) -> list[str]:
    """Return notes that say how to use the unused columns of folds or splits: column name -> one of its cells."""
    return [
        f"column {name!r} is not used; to take some rows as val: --split-column {name}={cell}"
        for name, cell in unused.items()
    ]


def split_of_row(text: str, name: str, value: str | None) -> str:
    """Return the split that a cell means, or "" if it means none.

    Args:
        text: The cell; an empty one means train.
        name: The name of its column.
        value: The value that means val, while all others mean train; None: the cell names the split.
    """
    if value is not None:
        return "val" if text == value else "train"
    if not text:
        return "train"
    if (of_true := FLAGS.get(normal(name))) and text.lower() in TRUTHS:
        others = "train" if of_true != "train" else "val"
        return of_true if TRUTHS[text.lower()] else others
    return split_of(text)[0]


def _by_name(rows: Rows, option: str, wanted: str) -> int:
    if wanted not in rows.names:
        error = unknown("column", wanted, rows.names)
        raise RequestError(f"{flag(option)}: {rows.path} has the columns {', '.join(rows.names)}; {error}")
    return _only(rows, [n for n, name in enumerate(rows.names) if name == wanted])


def _only(rows: Rows, numbers: Sequence[int]) -> int:
    """Return the first of several columns with the same name, if all hold the same cells."""
    if any(rows.column(n) != rows.column(numbers[0]) for n in numbers[1:]):
        raise RequestError(f"{rows.path}: {len(numbers)} columns are called {rows.names[numbers[0]]!r}: rename them")
    return numbers[0]


def _known(rows: Rows, names: Sequence[str], without: set[int | None]) -> list[int]:
    """Return the indices of the columns that have one of the names, in the names' order."""
    tidy = [normal(name) for name in rows.names]
    return [n for known in names for n, name in enumerate(tidy) if name == known and n not in without]


def _split_column(rows: Rows, options: Options) -> tuple[int | None, str | None]:
    if options.split_column:
        name, _, value = options.split_column.partition("=")
        return _by_name(rows, "split_column", name), value or None
    found = [
        n
        for n in _known(rows, (*SPLITS, *FLAGS), set())
        if normal(rows.names[n]) == "split" or holds_splits(rows.column(n), rows.names[n])
    ]
    if not found:  # a column in which every cell names a split
        free = [
            n
            for n, name in enumerate(rows.names)
            if normal(name) not in LABELS and name not in options.given().values()
        ]
        found = [n for n in free if divides(rows.column(n))]
    if len(found) > 1:
        raise RequestError(f"{rows.path}: which column is the split? {_ask(rows, found, 'split_column')}")
    return (found[0] if found else None), None


def holds_splits(cells: Sequence[str], name: str = "") -> bool:
    """Return whether every cell of a column names a split."""
    return bool(cells) and all(cell and split_of_row(cell, name, None) for cell in cells)


def divides(cells: Sequence[str]) -> bool:
    """Return whether every cell of a column is the name of a split and nothing else, and two splits are named."""
    splits = {split_of(cell) for cell in set(cells)}
    return len(splits) > 1 and all(sure for _, sure in splits)


def _path_column(rows: Rows, locator: Locator, options: Options, taken: set[int | None]) -> tuple[int, Location]:
    if options.path_column:
        number = _by_name(rows, "path_column", options.path_column)
        location = locator.locate(rows.column(number))
        if location is None:
            raise RequestError(_nowhere(rows, number, locator))
        return number, location
    known = _known(rows, PATHS, taken)
    others = [n for n in range(len(rows.names)) if n not in known and n not in taken]
    for numbers in (known, others):
        found = {n: place for n in numbers if (place := locator.locate(rows.column(n))) is not None}
        plain = {n: place for n, place in found.items() if place.note(rows.cells[0][n]) is None}
        found = plain if len(plain) == 1 else found
        if len(found) == 1:
            return found.popitem()
        if found:
            raise RequestError(f"{rows.path}: which column is the image? {_ask(rows, list(found), 'path_column')}")
    raise RequestError(_nowhere(rows, known[0] if known else 0, locator))


def _nowhere(rows: Rows, number: int, locator: Locator) -> str:
    example = shown(next((text for text in rows.column(number) if text), ""))
    if "://" in example:
        return f"{rows.path}: {example} is a URL, which is never fetched: download the images, give their paths"
    return (
        f"{rows.path}: no column names images that are in {locator.base}; {example!r} of {rows.names[number]!r} is "
        "not there: name the folder of the images with --image-root, or their column with --path-column"
    )


def _label_column(rows: Rows, options: Options, taken: set[int | None]) -> tuple[int | None, tuple[int, ...]]:
    if options.label_column:
        return _by_name(rows, "label_column", options.label_column), ()
    known = _known(rows, LABELS, taken)
    best = [n for n in known if normal(rows.names[n]) == normal(rows.names[known[0]])]
    if known and (normal(rows.names[known[0]]) == "label" or len(best) == len(known)):
        return _only(rows, best), ()
    rest = known or [n for n in range(len(rows.names)) if n not in taken and normal(rows.names[n]) not in FOLDS]
    able = [n for n in rest if known or could_be_labels(rows.column(n))]
    if len(able) == 1 and (known or len(rest) == 1):
        return able[0], ()
    if not known and len(rest) > 1 and all(_is_one_hot([row[n] for n in rest]) for row in rows.cells):
        return None, tuple(rest)
    raise RequestError(f"{rows.path}: which column is the label? {_ask(rows, rest, 'label_column')}")


def could_be_labels(cells: Sequence[str]) -> bool:
    """Return whether a column may hold classes: at least two rows share one, if there are several rows."""
    return any(map(is_label, cells)) and (len(cells) < 3 or len(set(cells)) < len(cells))


def _is_one_hot(cells: Sequence[str]) -> bool:
    return all(re.fullmatch(r"[01](\.0*)?", cell) for cell in cells) and sum(map(_is_one, cells)) == 1


def _is_one(cell: str) -> bool:
    return cell.startswith("1")


def _ask(rows: Rows, numbers: Sequence[int], option: str) -> str:
    names = [rows.names[n] for n in numbers]
    could = f"it could be {', '.join(names[:8])}" if names else f"none of {', '.join(rows.names[:8])} fits"
    return f"{could}: choose with {flag(option)} NAME"


def holds_path(cell: str) -> bool:
    """Return whether a cell can only be the path of an image, by its ending."""
    return cell[cell.rfind(".") :].lower() in SUFFIXES
