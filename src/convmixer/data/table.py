"""Tables of images: a row per image, with its path, its label and, if there is such a column, its split."""

import csv
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from convmixer.data.found import Found, file_size, listing_checksum, to_bytes
from convmixer.data.labels import SPLIT_WORDS, encode_labels
from convmixer.data.sources import Files, Source
from convmixer.errors import RequestError


def find_csv(path: Path, name: str) -> Found:
    """Return the images named by a table of path, label and, where there is one, split."""
    columns, rows = _table(path)
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for number, row in rows:
        if len(row) <= max(columns["path"], columns["label"]) or not (row[columns["path"]] and row[columns["label"]]):
            raise RequestError(f"{path} line {number}: expected path,label, found {','.join(row)!r}")
        paths, labels = groups.setdefault(_split_of(row, columns, path, number), ([], []))
        paths.append(row[columns["path"]])
        labels.append(row[columns["label"]])
    if not groups:
        raise RequestError(f"{path} names no images: expected lines of path,label")
    classes, encoded = encode_labels({split: labels for split, (_, labels) in groups.items()})
    sizes = [f"{p} {file_size(path.parent / p)}" for paths, _ in groups.values() for p in paths]
    splits: dict[str, tuple[Source, np.ndarray]] = {
        split: (Files(path.parent, to_bytes(paths)), encoded[split]) for split, (paths, _) in groups.items()
    }
    return Found(name, splits, classes, listing_checksum([hashlib.sha256(path.read_bytes()).hexdigest(), *sizes]))


def _table(path: Path) -> tuple[dict[str, int], list[tuple[int, list[str]]]]:
    """Return the column numbers of a table and its rows with their line numbers, the header left out."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"cannot read {path}: {error}") from error
    if rows and (columns := _columns(rows[0][1])):
        return columns, rows[1:]
    if len(rows) > 1 and file_size(path.parent / rows[0][1][0]) < 0 <= file_size(path.parent / rows[1][1][0]):
        raise RequestError(f"{path}: line 1 is no image, and as a header it must name the columns path and label")
    return {"path": 0, "label": 1, "split": 2}, rows


def _columns(first: Sequence[str]) -> dict[str, int]:
    """Return column numbers from a header row, or nothing where the first row is not one."""
    known = {
        "path": ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "img"),
        "label": ("label", "class", "target", "category", "class_name", "y"),
        "split": ("split", "subset", "partition"),
    }
    lower = [cell.lower() for cell in first]
    columns = {key: lower.index(n) for key, names in known.items() for n in names[::-1] if n in lower}
    return columns if "path" in columns and "label" in columns else {}


def _split_of(row: Sequence[str], columns: Mapping[str, int], path: Path, number: int) -> str:
    column = columns.get("split")
    if column is None or column >= len(row) or not row[column]:
        return "train"
    if row[column].lower() not in SPLIT_WORDS:
        raise RequestError(f"{path} line {number}: split {row[column]!r} is not train, val or test")
    return SPLIT_WORDS[row[column].lower()]
