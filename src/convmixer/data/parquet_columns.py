"""Finds the image, label, split, group and weight columns of parquet files by type and name, without guessing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from convmixer.data.columns import FLAGS, LABELS, SPLITS, could_be_labels, divides, holds_splits
from convmixer.data.csv_file import normal
from convmixer.data.labels import split_of
from convmixer.data.options import Options, flag
from convmixer.data.parquet_labels import read_features
from convmixer.errors import RequestError

IMAGES = ("image", "img")
PATH_NAMES = (*IMAGES, "path", "image_path", "img_path", "file_name", "filename", "file", "file_path")
PROBED_ROWS = 1000


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are used.

    Args:
        image, label: The columns of images and labels.
        split: The column of splits. None: the files' names give the splits, or all rows are train.
        split_value: The value of the split column that means val; None: its values name the splits.
        group, weight: The columns of groups and weights, or None.
    """

    image: str
    label: str
    split: str | None
    split_value: str | None
    group: str | None
    weight: str | None

    def used(self) -> list[str]:
        """Return the names of all columns that are used, each once."""
        names = (self.image, self.label, self.split, self.group, self.weight)
        return list(dict.fromkeys(name for name in names if name))


def find_columns(
    files: Mapping[str, Sequence[Path]], first: Path, schemas: Mapping[Path, pa.Schema], options: Options
) -> Columns:
    """Return the columns of parquet files.

    Args:
        files: The files of each split.
        first: The file whose columns and metadata decide.
        schemas: The schema of each file.
        options: What the user said about columns.

    Raises:
        RequestError: A column cannot be found without guessing, or a file lacks one.
    """
    schema = schemas[first]
    features = read_features(schema)
    image = _image_column(first, schema, features, options)
    label = _label_column(first, schema, features, options, image)
    split, value = _split_column(files, schema, options, {image, label})
    group = options.group if options.group in schema.names else None
    weight = options.weight_column and _named(first, schema, "weight_column", options.weight_column)
    columns = Columns(image, label, split, value, group, weight)
    for file, other in schemas.items():
        if missing := next((name for name in columns.used() if name not in other.names), None):
            raise RequestError(f"{file} has no column {missing!r}, which {first} has: {', '.join(other.names)}")
    return columns


def read_schema(file: Path) -> pa.Schema:
    """Return a file's columns and metadata; RequestError if it is not parquet."""
    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"{file} is not a readable parquet file: {error}") from error


def _of_type(features: Mapping[str, dict[str, Any]], kind: str, schema: pa.Schema) -> list[str]:
    return [name for name, about in features.items() if about.get("_type") == kind and name in schema.names]


def _image_column(file: Path, schema: pa.Schema, features: Mapping[str, dict[str, Any]], options: Options) -> str:
    if options.path_column:
        return _named(file, schema, "path_column", options.path_column)
    found = _of_type(features, "Image", schema) or [field.name for field in schema if holds_bytes(field.type)]
    found = found or [field.name for field in schema if is_text(field.type) and normal(field.name) in PATH_NAMES]
    preferred = [name for name in found if name in IMAGES]
    return _only("image", "path_column", preferred[:1] or found, file, schema)


def holds_bytes(kind: pa.DataType) -> bool:
    """Return whether a column of this type may hold encoded images."""
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds texts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _label_column(
    file: Path, schema: pa.Schema, features: Mapping[str, dict[str, Any]], options: Options, image: str
) -> str:
    if options.label_column:
        return _named(file, schema, "label_column", options.label_column)
    found = _of_type(features, "ClassLabel", schema)
    known = ("label", "labels", "fine_label", *LABELS)
    if len(found) > 1 or not found:
        called = [name for name in known for column in found or schema.names if normal(column) == name == column]
        found = called[:1] or found
    if not found:
        found = [f.name for f in schema if f.name != image and _could_be_labels(file, f)]
    return _only("label", "label_column", found, file, schema)


def _could_be_labels(file: Path, column: pa.Field) -> bool:
    """Return whether a column may hold classes: whole numbers or texts, some of which repeat."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if split_of(column.name)[0] or not (pa.types.is_integer(kind) or is_text(kind) or pa.types.is_boolean(kind)):
        return False
    return could_be_labels(probe(file, column.name))


def probe(file: Path, column: str) -> list[str]:
    """Return the first values of a column as texts."""
    batches = pq.ParquetFile(file).iter_batches(PROBED_ROWS, columns=[column])
    first = next(batches, None)
    return [str(value) for value in first[0].to_pylist()] if first is not None else [""]


def _split_column(
    files: Mapping[str, Sequence[Path]], schema: pa.Schema, options: Options, taken: set[str]
) -> tuple[str | None, str | None]:
    first = next(iter(files.values()))[0]
    if options.split_column:
        name, _, value = options.split_column.partition("=")
        return _named(first, schema, "split_column", name), value or None
    free = [name for name in schema.names if name not in (*taken, *options.given().values())]
    own = next(iter(files.values()))
    found = [name for name in free if normal(name) == "split"]
    if not found and len(files) == 1:  # the file names do not give the splits
        able = [name for name in free if normal(name) in (*SPLITS, *FLAGS)]
        found = [name for name in able if holds_splits(_distinct(own, name), name)]
        found = found or [
            n
            for n in free
            if is_text(schema.field(n).type) and divides(probe(first, n)) and divides(_distinct(own, n))
        ]
    if len(found) > 1:
        raise RequestError(f"{first}: which column is the split? {', '.join(found)}: choose with --split-column NAME")
    return (found[0] if found else None), None


def _distinct(files: Sequence[Path], column: str) -> list[str]:
    """Return the different values of a column as texts; a null is an empty text."""
    tables = (pq.read_table(file, columns=[column]) for file in files)
    found = {value for table in tables for value in pc.unique(table[column]).to_pylist()}
    return ["" if value is None else str(value) for value in found]


def _named(file: Path, schema: pa.Schema, option: str, name: str) -> str:
    if name not in schema.names:
        raise RequestError(f"{flag(option)} {name}: {file} has the columns {', '.join(schema.names)}")
    return name


def _only(kind: str, option: str, found: Sequence[str], file: Path, schema: pa.Schema) -> str:
    if len(found) != 1:
        which = f"several could be ({', '.join(found)})" if found else "none is"
        raise RequestError(
            f"{file}: which column is the {kind}? of {', '.join(schema.names)}, {which}: "
            f"choose with {flag(option)} NAME"
        )
    return found[0]
