"""Reads the labels of parquet files: texts, or numbers whose names are in each file's metadata.

Files may number the same classes differently.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from convmixer.data.labels import check_names, encode_labels, is_label, tidy_name
from convmixer.errors import RequestError, shown

METADATA_BYTES = 16 << 20  # a longer column description is ignored


def read_features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return Hugging Face's description of the columns; {} if there is none, or it has another format."""
    text = (schema.metadata or {}).get(b"huggingface", b"")
    try:
        found = json.loads(text)["info"]["features"] if 0 < len(text) <= METADATA_BYTES else {}
        return {str(name): about for name, about in found.items() if isinstance(about, dict)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def class_names(features: Mapping[str, dict[str, Any]], label: str) -> list[str] | None:
    """Return the names of the classes in the order of their numbers, if the metadata hold them."""
    about = features.get(label, {})
    names = about.get("names")
    whole = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return list(names) if about.get("_type") == "ClassLabel" and whole else None  # type: ignore[arg-type]


class Classes:
    """The classes of several files, each of which may name and number them differently.

    Args:
        names: File -> its names of the classes in the order of their numbers, or None; the first file's are kept.

    Raises:
        RequestError: One file names its classes and another does not, or knows a class that the first does not.
    """

    def __init__(self, names: Mapping[Path, list[str] | None]) -> None:
        first = next(iter(names))
        self.names = names[first]
        self._numbers: dict[Path, list[int]] = {}
        known = {tidy_name(name): number for number, name in enumerate(self.names or ())}
        for file, own in names.items():
            if own == self.names:
                continue
            if own is None or self.names is None:
                with_names, without = (first, file) if own is None else (file, first)
                raise RequestError(
                    f"{with_names} names its classes, {without} only numbers them: give both the same class names"
                )
            if missing := next((name for name in own if tidy_name(name) not in known), None):
                raise RequestError(f"{file} has the class {shown(missing)!r}, which {first} does not have")
            self._numbers[file] = [known[tidy_name(name)] for name in own]

    def renumbered(self, file: Path, table: pa.Table, label: str) -> pa.Table:
        """Return a file's table with the numbers of the first file in its column of labels."""
        if (numbers := self._numbers.get(file)) is None or not pa.types.is_integer(table[label].type):
            return table
        values = table[label].to_pylist()
        if (largest := max((v for v in values if v is not None), default=0)) >= len(numbers):
            raise RequestError(f"{file} has label {largest} but only {len(numbers)} class names")
        found = [v if v is None or v < 0 else numbers[v] for v in values]
        return table.set_column(table.column_names.index(label), label, pa.array(found, pa.int64()))


def has_no_labels(column: pa.ChunkedArray) -> bool:
    """Return whether a column holds only nulls or negative numbers."""
    if column.null_count == len(column):
        return True
    return pa.types.is_integer(column.type) and pc.max(column).as_py() < 0


def read_labels(
    name: str, columns: Mapping[str, pa.ChunkedArray], names: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Return class names and labels.

    Raises:
        RequestError: An image has no label or more than one, or two classes have the same name.
    """
    texts = {}
    for split, column in columns.items():
        if pa.types.is_nested(column.type):
            raise RequestError(f"column {name!r} holds {column.type}: an image has exactly one label here")
        if pa.types.is_floating(column.type):
            column = _whole_numbers(name, split, column)
        if names is not None and not pa.types.is_integer(column.type):
            raise RequestError(
                f"split {split}: column {name!r} holds {column.type}, but the metadata name classes by number"
            )
        lowest = pc.min(column).as_py() if pa.types.is_integer(column.type) else 0
        if column.null_count or lowest < 0:
            raise RequestError(f"some images of split {split} have no label in column {name!r}; remove them")
        if names is not None and (largest := pc.max(column).as_py()) >= len(names):
            raise RequestError(f"split {split} has label {largest} but only {len(names)} class names")
        texts[split] = [str(value) for value in column.to_pylist()]
    if names is None:
        if missing := next((t for ts in texts.values() for t in ts if not is_label(t)), None):
            raise RequestError(f"column {name!r} holds {missing!r}, which is not a label: remove these images")
        return encode_labels(texts)
    check_names(names)
    return tuple(map(tidy_name, names)), {s: np.array([int(t) for t in ts], np.int64) for s, ts in texts.items()}


def _whole_numbers(name: str, split: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pc.any(pc.is_nan(column)).as_py():
        raise RequestError(f"some images of split {split} have no label in column {name!r} (NaN); remove them")
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        between = next(value for value in column.to_pylist() if value != int(value))
        raise RequestError(f"column {name!r} holds {between}, but labels are texts or whole numbers") from error
