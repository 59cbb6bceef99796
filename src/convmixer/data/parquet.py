"""Parquet files of images, as Hugging Face and others write them: a row per image, columns found by their types."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from convmixer.data.found import Found, files_checksum
from convmixer.data.labels import by_split, encode_labels
from convmixer.data.sources import Column, Source, binary_column
from convmixer.errors import RequestError
from convmixer.files import cache_folder

IN_MEMORY_BYTES = 4 << 30  # larger parquet is mapped from an Arrow copy on disk


def find_parquet(path: Path, files: Sequence[Path], name: str) -> Found:
    """Return the images in parquet files as Hugging Face writes them, columns found by feature type."""
    features = _features(files[0])
    image, label = _image_column(files[0], features), _label_column(files[0], features)
    tables = {split: read_parquet(members, [image, label]) for split, members in by_split(files, path).items()}
    unlabelled = [split for split, table in tables.items() if _no_labels(table[label])]
    used = {split: table for split, table in tables.items() if split not in unlabelled}
    if not used:
        raise RequestError(f"{path}: column {label!r} holds no labels (all -1 or empty)")
    classes, labels = _parquet_labels({s: t[label] for s, t in used.items()}, features.get(label, {}).get("names"))
    splits: dict[str, tuple[Source, np.ndarray]] = {
        split: (Column(split, binary_column(table[image])), labels[split]) for split, table in used.items()
    }
    notes = [f"split {split} has no labels: not used" for split in unlabelled]
    if features.get(label, {}).get("_type") != "ClassLabel":
        notes.append(f"labels are those of column {label!r}")
    return Found(name, splits, classes, files_checksum(files), notes=notes)


def read_parquet(files: Sequence[Path], columns: list[str]) -> pa.Table:
    """Return columns of parquet files, in memory or, where they are large, mapped from a copy in the cache folder."""
    large = sum(file.stat().st_size for file in files) > IN_MEMORY_BYTES
    try:
        return pa.concat_tables([(_mapped if large else pq.read_table)(file, columns=columns) for file in files])
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"cannot read {files[0].parent}/*.parquet: {error}") from error


def _mapped(file: Path, columns: list[str]) -> pa.Table:
    """Return columns of a parquet file from an uncompressed Arrow copy: parquet itself has no access by row."""
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


def _no_labels(column: pa.ChunkedArray) -> bool:
    if column.null_count == len(column):
        return True
    return pa.types.is_integer(column.type) and pc.max(column).as_py() < 0


def _features(file: Path) -> dict[str, Any]:
    """Return Hugging Face's description of the columns, empty where there is none."""
    try:
        metadata = pq.read_schema(file).metadata or {}
        features: dict[str, Any] = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise RequestError(f"{file} is not a readable parquet file: {error}") from error
    return features


def _image_column(file: Path, features: Mapping[str, Any]) -> str:
    schema = pq.read_schema(file)
    found = [
        n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "Image" and n in schema.names
    ]
    for column in schema:
        kind = column.type
        if not features and pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            found.append(column.name)
        if not features and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            found.append(column.name)
    return _only("image", found, ("image", "img"), file, schema.names)


def _label_column(file: Path, features: Mapping[str, Any]) -> str:
    schema = pq.read_schema(file)
    found = [n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"]
    preferred = ("label", "labels", "fine_label", "class", "target")
    found = found or [column.name for column in schema if column.name in preferred]
    found = found or [column.name for column in schema if pa.types.is_integer(column.type)]
    return _only("label", found, preferred, file, schema.names)


def _only(kind: str, found: Sequence[str], preferred: Iterable[str], file: Path, names: Sequence[str]) -> str:
    """Return the one candidate, or the first preferred name among several."""
    for name in preferred:
        if name in found:
            return name
    if len(found) != 1:
        which = f"several could be ({', '.join(found)}); call it {kind}" if found else "none is"
        raise RequestError(f"{file}: which column is the {kind}? of {', '.join(names)}, {which}")
    return found[0]


def _parquet_labels(
    columns: Mapping[str, pa.ChunkedArray], names: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    for split, column in columns.items():
        lowest = pc.min(column).as_py() if pa.types.is_integer(column.type) else 0
        if column.null_count or lowest < 0:
            raise RequestError(f"some images of split {split} have no label; remove them")
        if names is not None and pc.max(column).as_py() >= len(names):
            raise RequestError(f"split {split} has label {pc.max(column).as_py()} but only {len(names)} class names")
    if names is None:
        return encode_labels({split: [str(v) for v in column.to_pylist()] for split, column in columns.items()})
    return tuple(names), {split: column.to_numpy().astype(np.int64) for split, column in columns.items()}
