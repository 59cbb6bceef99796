"""Tables of images: one row per image, with its path, its label and, if there is such a column, its split."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convmixer.data.argument import TABLES
from convmixer.data.columns import KNOWN, Columns, choose_columns, holds_path, split_of_row
from convmixer.data.csv_file import Rows, read_csv
from convmixer.data.found import Found, listing_checksum, loss_weights, to_bytes
from convmixer.data.labels import encode_labels, is_label, split_of
from convmixer.data.located import Locator
from convmixer.data.options import Options
from convmixer.data.sources import Files, Source
from convmixer.data.status import file_status
from convmixer.data.unused import NO_IMAGE, Unused
from convmixer.data.walk import is_image, walk
from convmixer.errors import RequestError, shown

A_COLUMN = "a column of the table"
NOT_NAMED = "an image that the table does not name"


def find_table(path: Path, name: str, options: Options) -> Found:
    """Return the images named by a table.

    Raises:
        RequestError: Columns or images cannot be found without guessing, or a row has no path or label.
    """
    base = Path(options.image_root).expanduser() if options.image_root else path.parent
    if not base.is_dir():
        raise RequestError(f"--image-root {base} is not a folder")
    rows = read_csv(path, KNOWN, holds_path)
    _refuse_narrow(rows)
    columns = choose_columns(rows, Locator(base, path.name), options)
    order = _rows_by_split(rows, columns)
    paths = {split: [columns.location.path(rows.cells[n][columns.path]) for n in ns] for split, ns in order.items()}
    status = {split: file_status(base, found) for split, found in paths.items()}
    classes, encoded = encode_labels({split: [columns.labels[n] for n in ns] for split, ns in order.items()})
    splits: dict[str, tuple[Source, np.ndarray]] = {
        split: (Files(base, to_bytes(found), status[split]), encoded[split]) for split, found in paths.items()
    }
    sizes = [f"{p} {n}" for s, found in paths.items() for p, n in zip(found, status[s][:, 0], strict=True)]
    checksum = listing_checksum([hashlib.sha256(path.read_bytes()).hexdigest(), *sizes])
    unused = _unused(rows, columns, base, [p for found in paths.values() for p in found])
    groups = _groups(rows, order, columns.group)
    weights = _weights(rows, order, columns.weight)
    notes = [*columns.notes, *([] if columns.split is not None else _other_splits(path))]
    return Found(name, splits, classes, checksum, notes=notes, unused=unused, groups=groups, weights=weights)


def _refuse_narrow(rows: Rows) -> None:
    if len(rows.names) < 2:
        line = rows.lines[0] if rows.lines else 1
        found = (rows.cells or [rows.names])[0][0]
        raise RequestError(f"{rows.path} line {line}: expected path,label, found {shown(found)!r}")


def _other_splits(path: Path) -> list[str]:
    """Return a note if the table is called like one split and tables of other splits are next to it."""
    own = split_of(path.stem)[0]
    if not own:
        return []
    tables = sorted(file for file in path.parent.iterdir() if file.suffix.lower() in TABLES)
    others = [file.name for file in tables if split_of(file.stem)[0] not in ("", own)]
    if not others:
        return []
    return [f"{', '.join(others)} next to it is not read: for its split join the tables, with a column split"]


def _rows_by_split(rows: Rows, columns: Columns) -> dict[str, list[int]]:
    """Return the numbers of the rows of each split, in their order.

    Raises:
        RequestError: A row lacks a path, a label or a split.
    """
    splits: dict[str, list[int]] = {}
    for number, (line, cells) in enumerate(zip(rows.lines, rows.cells, strict=True)):
        where = f"{rows.path} line {line}"
        if not cells[columns.path]:
            raise RequestError(f"{where}: no path of an image")
        if not is_label(label := columns.labels[number]):
            raise RequestError(f"{where}: no label, found {shown(label)!r}: give it one, or remove the line")
        text = cells[columns.split] if columns.split is not None else ""
        name = rows.names[columns.split] if columns.split is not None else ""
        split = split_of_row(text, name, columns.split_value) if columns.split is not None else "train"
        if not split:
            raise RequestError(f"{where}: split {shown(text)!r} is not train, val or test")
        splits.setdefault(split, []).append(number)
    return splits


def _unused(rows: Rows, columns: Columns, base: Path, paths: Sequence[str]) -> Unused:
    """Count unused columns, and files in the images' folder that the table does not name."""
    unused = Unused()
    unused.add(A_COLUMN, *(name for n, name in enumerate(rows.names) if n not in columns.used()))
    named = {os.path.normpath(path) for path in paths}
    folder = os.path.commonpath([os.path.dirname(path) for path in named]) if _all_below(named) else ""
    if not folder:  # the images are in many folders, or in the table's own, which may hold anything
        return unused
    walked = walk(base / folder)
    rest = [path for file in walked.files if (path := f"{folder}/{file}") not in named]
    unused.add(NOT_NAMED, *filter(is_image, rest))
    unused.add(NO_IMAGE, *(path for path in rest if not is_image(path)))
    unused.update(walked.unused, folder)
    return unused


def _all_below(paths: set[str]) -> bool:
    return not any(path.startswith(("/", "..")) for path in paths)


def _weights(rows: Rows, order: dict[str, list[int]], column: int | None) -> dict[str, np.ndarray]:
    if column is None:
        return {}
    weights = loss_weights(rows.names[column], rows.column(column))
    return {split: weights[numbers] for split, numbers in order.items()}


def _groups(rows: Rows, order: dict[str, list[int]], column: int | None) -> dict[str, Sequence[str]]:
    """Return the group of each image if the option names a column; patterns are applied to names later."""
    if column is None:
        return {}
    return {split: [rows.cells[n][column] for n in numbers] for split, numbers in order.items()}
