"""Parquet files of images, as Hugging Face and others write them: one row per image, columns found by their types."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from convmixer.data.columns import fold_notes, may_split, split_of_row
from convmixer.data.found import Found, files_checksum, loss_weights, to_bytes
from convmixer.data.labels import by_split
from convmixer.data.located import Locator
from convmixer.data.options import Options
from convmixer.data.parquet_columns import Columns, find_columns, holds_bytes, is_text, probe, read_schema
from convmixer.data.parquet_labels import Classes, class_names, has_no_labels, read_features, read_labels
from convmixer.data.sources import Column, Files, Source, binary_column
from convmixer.data.splits import group_names
from convmixer.data.table import A_COLUMN
from convmixer.errors import RequestError, shown
from convmixer.files import cache_folder

IN_MEMORY_BYTES = 4 << 30  # larger files are mapped from an Arrow copy on disk


def find_parquet(path: Path, files: Sequence[Path], name: str, options: Options, own_disk: bool = True) -> Found:
    """Return the images in parquet files.

    Args:
        path: The folder or file that was named.
        files: All of the data's parquet files.
        name: Name of the data.
        options: What the user said about columns.
        own_disk: The files belong to this user, so image paths in them are opened. In other files, paths are not
            opened.

    Raises:
        RequestError: The files cannot be read, or columns cannot be found without guessing.
    """
    schemas = {file: read_schema(file) for file in files}
    by_name = by_split(files, path)
    first = next(iter(by_name.get("train") or files))
    columns = find_columns(by_name, first, schemas, options)
    numbers = Classes({f: class_names(read_features(schemas[f]), columns.label) for f in (first, *files)})
    tables = _tables(by_name, columns, numbers)
    unlabelled = [split for split, table in tables.items() if has_no_labels(table[columns.label])]
    used = {split: table for split, table in tables.items() if split not in unlabelled}
    if not used:
        raise RequestError(f"{path}: column {columns.label!r} holds no labels (all -1 or empty)")
    classes, labels = read_labels(columns.label, {s: t[columns.label] for s, t in used.items()}, numbers.names)
    base = Path(options.image_root) if options.image_root else (path if path.is_dir() else path.parent)
    notes = [f"split {split} has no labels: not used" for split in unlabelled]
    splits: dict[str, tuple[Source, np.ndarray]] = {}
    for s, table in used.items():
        source, note = _images(s, table[columns.image], base, own_disk)
        if isinstance(source, Column):
            source = replace(source, files=tuple(files), chosen=f"{columns}\0{s}")
        splits[s] = source, labels[s]
        notes += [note] if note else []
    if not numbers.names:
        notes.append(f"labels are those of column {columns.label!r}")
    if columns.split and not options.split_column and not may_split(columns.split):
        notes.append(f"splits are those of column {columns.split!r}")
    unused = [name for name in schemas[first].names if name not in columns.used()]
    notes += fold_notes({name: probe(first, name)[0] for name in unused if may_split(name)})
    groups = _groups(first, used, columns, options)
    weights: dict[str, np.ndarray] = {}
    if weight := columns.weight:
        weights |= {s: loss_weights(weight, t[weight].to_pylist()) for s, t in used.items()}
    found = Found(name, splits, classes, files_checksum(files), notes=notes, groups=groups, weights=weights)
    found.unused.add(A_COLUMN, *unused)
    return found


def _tables(files: Mapping[str, Sequence[Path]], columns: Columns, numbers: Classes) -> dict[str, pa.Table]:
    """Return the rows of each split."""

    def table(part: Sequence[Path]) -> pa.Table:
        read = read_parquet(part, columns.used())
        return _joined([numbers.renumbered(f, t, columns.label) for f, t in zip(part, read, strict=True)], part)

    tables = {split: table(part) for split, part in files.items()}
    if columns.split is None:
        return tables
    every = [file for part in files.values() for file in part]
    return _divided(_joined(list(tables.values()), every), columns.split, columns.split_value)


def _groups(
    file: Path, tables: Mapping[str, pa.Table], columns: Columns, options: Options
) -> dict[str, Sequence[str]]:
    """Return the group of each image: its cell in a column, or what a pattern matches in its path."""
    if options.group is None:
        return {}
    cells, paths = {}, {}
    if columns.group:
        cells = {s: _texts(t[columns.group]) for s, t in tables.items()}
    else:
        paths = {s: _paths(t[columns.image]) for s, t in tables.items()}
        if not any(map(any, paths.values())):
            raise RequestError(
                f"--group {options.group}: {file} has no such column, and its images have no paths for a pattern"
            )
    return dict(group_names(options, cells, paths))


def _texts(values: pa.ChunkedArray) -> list[str]:
    return ["" if value is None else str(value) for value in values.to_pylist()]


def _paths(values: pa.ChunkedArray) -> list[str]:
    """Return the path of each image, or "" if the column does not hold it."""
    if pa.types.is_struct(values.type):
        if values.type.get_field_index("path") < 0:
            return [""] * len(values)
        values = pc.struct_field(values, "path")
    return _texts(values) if is_text(values.type) else [""] * len(values)


def _joined(tables: Sequence[pa.Table], files: Sequence[Path]) -> pa.Table:
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise RequestError(
            f"the columns of {files[0]} and of the other files do not fit together: {reason}"
        ) from error


def read_parquet(files: Sequence[Path], columns: list[str]) -> list[pa.Table]:
    """Return columns of each file. Large ones are memory-mapped from a copy in the cache folder."""
    large = sum(file.stat().st_size for file in files) > IN_MEMORY_BYTES
    try:
        return [(_mapped if large else pq.read_table)(file, columns=columns) for file in files]
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"cannot read {files[0].parent}/*.parquet: {error}") from error


def _mapped(file: Path, columns: list[str]) -> pa.Table:
    """Return columns of a parquet file from an uncompressed Arrow copy: parquet has no random access to rows."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {columns}".encode()).hexdigest()[:16]
    cache = cache_folder()
    copy = cache / f"{file.stem}-{key}.arrow"
    if not copy.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = copy.with_suffix(f".{os.getpid()}.partial")
        opened = pq.ParquetFile(file)
        schema = pa.schema([opened.schema_arrow.field(name) for name in columns])
        with pa.ipc.new_file(str(partial), schema) as writer:
            for batch in opened.iter_batches(1024, columns=columns):
                writer.write_batch(batch.select(columns))
        partial.replace(copy)
    return pa.ipc.open_file(pa.memory_map(str(copy))).read_all()


def _divided(table: pa.Table, column: str, val: str | None) -> dict[str, pa.Table]:
    """Return split -> its rows.

    Args:
        table: All rows.
        column: The column that names the split.
        val: The value that means val, while all others mean train; None: the values name the split.
    """
    found: dict[str, list[Any]] = {}
    for value in pc.unique(table[column]).to_pylist():
        split = split_of_row("" if value is None else str(value), column, val)
        if not split or value is None:
            raise RequestError(f"column {column!r}: split {value!r} is not train, val or test")
        found.setdefault(split, []).append(value)
    return {s: table.filter(pc.is_in(table[column], pa.array(values))) for s, values in found.items()}


def _images(split: str, values: pa.ChunkedArray, base: Path, own_disk: bool) -> tuple[Source, str | None]:
    """Return the images of a column: the bytes in it, or if there are none, the files that it names."""
    kind = values.type
    if holds_bytes(kind):
        inside = binary_column(values)
        if inside.null_count < len(inside):
            return Column(split, inside), None
        if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
            raise RequestError(f"split {split}: the column of images is empty")
        values = pc.struct_field(values, "path")
    paths = _texts(values)
    if not own_disk:
        raise RequestError("these files hold only paths, not images: paths in untrusted files are not opened")
    location = Locator(base, split).locate(paths)
    if location is None:
        example = shown(next((path for path in paths if path), "nothing"))
        raise RequestError(
            f"the images are not in the parquet files, only their paths, and {example!r} is not there: say where "
            "they are with --image-root"
        )
    note = location.note(next(path for path in paths if path))
    read = f"split {split}: the images are read from the paths in the column"
    return Files(base, to_bytes(map(location.path, paths))), f"{read}; {note}" if note else read
