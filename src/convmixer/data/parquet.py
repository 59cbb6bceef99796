"""Parquet files of images, as Hugging Face and others write them: one row per image, columns found by their types."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from convmixer.data.columns import LABELS, could_be_labels, split_of_row
from convmixer.data.csv_file import normal
from convmixer.data.found import Found, files_checksum, loss_weights, to_bytes
from convmixer.data.labels import by_split, check_names, encode_labels, is_label, split_of, tidy_name
from convmixer.data.located import Locator
from convmixer.data.options import Options, flag
from convmixer.data.sources import Column, Files, Source, binary_column
from convmixer.data.table import A_COLUMN
from convmixer.errors import RequestError
from convmixer.files import cache_folder

IN_MEMORY_BYTES = 4 << 30  # larger parquet is mapped from an Arrow copy on disk
METADATA_BYTES = 16 << 20  # a longer description of the columns is ignored
IMAGES = ("image", "img")
PROBED_ROWS = 1000


def find_parquet(path: Path, files: Sequence[Path], name: str, options: Options, own_disk: bool = True) -> Found:
    """Return the images in parquet files.

    Args:
        path: The folder or file that was named.
        files: All of the data's parquet files.
        name: Name of the data.
        options: What the user said about columns.
        own_disk: The files belong to this user, so image paths in them are opened. In files from elsewhere they are
            not.

    Raises:
        RequestError: The files cannot be read, or columns cannot be found without guessing.
    """
    schema, features = _schema(files[0]), _features(files[0])
    image = _image_column(files[0], schema, features, options)
    label = _label_column(files[0], schema, features, options, image)
    split, value = _split_column(files[0], schema, options, {image, label})
    group = options.group if options.group in schema.names else None
    weight = options.weight_column and _named(files[0], schema, "weight_column", options.weight_column)
    wanted = list(dict.fromkeys(column for column in (image, label, split, group, weight) if column))
    tables = {split: read_parquet(members, wanted) for split, members in by_split(files, path).items()}
    if split:
        tables = _divided(pa.concat_tables(tables.values()), split, value)
    unlabelled = [split for split, table in tables.items() if _no_labels(table[label])]
    used = {split: table for split, table in tables.items() if split not in unlabelled}
    if not used:
        raise RequestError(f"{path}: column {label!r} holds no labels (all -1 or empty)")
    classes, labels = _labels(label, {s: t[label] for s, t in used.items()}, _class_names(features, label))
    base = Path(options.image_root) if options.image_root else (path if path.is_dir() else path.parent)
    notes = [f"split {split} has no labels: not used" for split in unlabelled]
    splits: dict[str, tuple[Source, np.ndarray]] = {}
    for s, table in used.items():
        source, note = _images(s, table[image], base, own_disk)
        splits[s] = source, labels[s]
        notes += [note] if note else []
    if not _class_names(features, label):
        notes.append(f"labels are those of column {label!r}")
    groups: dict[str, Sequence[str]] = {}
    groups |= {s: [str(v) for v in t[group].to_pylist()] for s, t in used.items()} if group else {}
    weights: dict[str, np.ndarray] = {}
    weights |= {s: loss_weights(weight, t[weight].to_pylist()) for s, t in used.items()} if weight else {}
    found = Found(name, splits, classes, files_checksum(files), notes=notes, groups=groups, weights=weights)
    found.unused.add(A_COLUMN, *(column for column in schema.names if column not in wanted))
    return found


def read_parquet(files: Sequence[Path], columns: list[str]) -> pa.Table:
    """Return columns of parquet files. Large ones are memory-mapped from a copy in the cache folder."""
    large = sum(file.stat().st_size for file in files) > IN_MEMORY_BYTES
    try:
        return pa.concat_tables([(_mapped if large else pq.read_table)(file, columns=columns) for file in files])
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


def _schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"{file} is not a readable parquet file: {error}") from error


def _features(file: Path) -> dict[str, dict[str, Any]]:
    """Return Hugging Face's description of the columns; {} if there is none in the expected format."""
    text = (_schema(file).metadata or {}).get(b"huggingface", b"")
    try:
        found = json.loads(text)["info"]["features"] if 0 < len(text) <= METADATA_BYTES else {}
        return {str(name): about for name, about in found.items() if isinstance(about, dict)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _class_names(features: Mapping[str, dict[str, Any]], label: str) -> list[str] | None:
    """Return the names of the classes in the order of their numbers, if the metadata hold them."""
    about = features.get(label, {})
    names = about.get("names")
    whole = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return list(names) if about.get("_type") == "ClassLabel" and whole else None  # type: ignore[arg-type]


def _of_type(features: Mapping[str, dict[str, Any]], kind: str, schema: pa.Schema) -> list[str]:
    return [name for name, about in features.items() if about.get("_type") == kind and name in schema.names]


def _image_column(file: Path, schema: pa.Schema, features: Mapping[str, dict[str, Any]], options: Options) -> str:
    if options.path_column:
        return _named(file, schema, "path_column", options.path_column)
    found = _of_type(features, "Image", schema) or [field.name for field in schema if _holds_bytes(field.type)]
    found = found or [field.name for field in schema if _is_text(field.type) and normal(field.name) in PATH_NAMES]
    preferred = [name for name in found if name in IMAGES]
    return _only("image", "path_column", preferred[:1] or found, file, schema)


PATH_NAMES = (*IMAGES, "path", "image_path", "img_path", "file_name", "filename", "file", "file_path")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
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
    if split_of(column.name)[0] or not (pa.types.is_integer(kind) or _is_text(kind) or pa.types.is_boolean(kind)):
        return False
    first = next(pq.ParquetFile(file).iter_batches(PROBED_ROWS, columns=[column.name]), None)
    return first is not None and could_be_labels([str(value) for value in first[0].to_pylist()])


def _split_column(file: Path, schema: pa.Schema, options: Options, taken: set[str]) -> tuple[str | None, str | None]:
    if options.split_column:
        name, _, value = options.split_column.partition("=")
        return _named(file, schema, "split_column", name), value or None
    return next((name for name in schema.names if normal(name) == "split" and name not in taken), None), None


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


def _named(file: Path, schema: pa.Schema, option: str, name: str) -> str:
    if name not in schema.names:
        raise RequestError(f"{flag(option)} {name}: {file} has the columns {', '.join(schema.names)}")
    return name


def _only(kind: str, option: str, found: Sequence[str], file: Path, schema: pa.Schema) -> str:
    if len(found) != 1:
        which = f"several could be ({', '.join(found)})" if found else "none is"
        raise RequestError(
            f"{file}: which column is the {kind}? of {', '.join(schema.names)}, {which}: "
            f"say it with {flag(option)} NAME"
        )
    return found[0]


def _images(split: str, values: pa.ChunkedArray, base: Path, own_disk: bool) -> tuple[Source, str | None]:
    """Return the images of a column: the bytes in it, or if there are none, the files that it names."""
    kind = values.type
    if _holds_bytes(kind):
        inside = binary_column(values)
        if inside.null_count < len(inside):
            return Column(split, inside), None
        if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
            raise RequestError(f"split {split}: the column of images is empty")
        values = pc.struct_field(values, "path")
    paths = ["" if value is None else str(value) for value in values.to_pylist()]
    if not own_disk:
        raise RequestError("these files hold only paths, not images: paths in untrusted files are not opened")
    location = Locator(base, split).locate(paths)
    if location is None:
        example = next((path for path in paths if path), "nothing")
        raise RequestError(
            f"the images are not in the parquet files, only their paths, and {example!r} is not there: say where "
            "they are with --image-root"
        )
    note = location.note(next(path for path in paths if path))
    read = f"split {split}: the images are read from the paths in the column"
    return Files(base, to_bytes(map(location.path, paths))), f"{read}; {note}" if note else read


def _no_labels(column: pa.ChunkedArray) -> bool:
    if column.null_count == len(column):
        return True
    return pa.types.is_integer(column.type) and pc.max(column).as_py() < 0


def _labels(
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
        raise RequestError(f"column {name!r} holds numbers between classes, such as {column[0]}") from error
