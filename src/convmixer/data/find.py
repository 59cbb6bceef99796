"""What a data argument means: finds the images, labels, splits and class names behind it. Decodes no image."""

import csv
import hashlib
import itertools
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from convmixer.data.argument import HUB, SHARDS, read_argument
from convmixer.data.hub import download
from convmixer.data.sources import Arrays, Column, Files, Shards, Source, binary_column, index_tar, read_range
from convmixer.errors import RequestError
from convmixer.files import cache_folder
from convmixer.preprocess import SUFFIXES

STATISTICS = {  # mean and standard deviation per channel of the training images
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
IN_MEMORY_BYTES = 4 << 30  # larger parquet is mapped from an Arrow copy on disk
HASHED_BYTES = 2 << 30  # above this the checksum covers names and sizes instead of contents


@dataclass(frozen=True)
class Found:
    """Images and labels as they lie there.

    Args:
        name: What to call the data.
        splits: "train", "val" or "test" -> images and int64 labels; data without splits are all "train".
        classes: Class names by label.
        checksum: "sha256:..." of the contents or "listing-sha256:..." of names and sizes.
        in_chans: Channels, where known without looking.
        notes: What the user should know.
        spec: The data argument so written that it means the same from every folder.
    """

    name: str
    splits: dict[str, tuple[Source, np.ndarray]]
    classes: tuple[str, ...]
    checksum: str
    in_chans: int | None = None
    notes: list[str] = field(default_factory=list)
    spec: str = ""


def find(spec: str, recorded: bool = False) -> Found:
    """Return the images and labels behind a data argument; for the arguments see `argument.read_argument`.

    Raises:
        RequestError: Nothing usable is there; the message says what to do.
    """
    argument = read_argument(spec, recorded)
    if argument.spec == "digits":
        found = find_digits()
    else:
        path = argument.path or download(argument) / argument.inside
        found = find_path(path, None if argument.repository is None else spec.removeprefix(HUB))
    return replace(found, spec=argument.spec, notes=[*argument.notes, *found.notes])


def find_path(path: Path, name: str | None = None) -> Found:
    """Return the images and labels in a file or folder, by what it holds."""
    name = name or path.resolve().name
    if path.suffix.lower() in (".csv", ".tsv"):
        return find_csv(path, name)
    if path.is_file() and path.suffix not in SHARDS:
        raise RequestError(f"{path} is not a data set: give a folder, or a .csv, .tsv, .tar or .parquet file")
    kind, files = _shards(path)
    if kind == ".parquet":
        return find_parquet(path, files, name)
    return find_tars(path, files, name) if kind == ".tar" else find_folder(path, name)


def find_digits() -> Found:
    """Return the 1,797 scans of handwritten digits inside scikit-learn, 8 x 8 pixels of 17 grey levels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    checksum = "sha256:" + hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    source = Arrays(pixels, [f"digits[{i}]" for i in range(len(pixels))])
    classes = tuple(str(name) for name in digits.target_names)
    return Found("digits", {"train": (source, labels)}, classes, checksum, in_chans=1)


def find_folder(path: Path, name: str) -> Found:
    """Return the images of a folder `<split>/<class>/*` or `<class>/*`.

    Raises:
        RequestError: No images, or two folders of one split, e.g. val and validation.
    """
    named = [folder for folder in _subfolders(path) if folder.name.lower() in SPLIT_NAMES]
    flat = [folder for folder in named if not _subfolders(folder)]  # images without a class
    folders: dict[str, Path] = {}
    for folder in (folder for folder in named if folder not in flat):
        split = SPLIT_NAMES[folder.name.lower()]
        if split in folders:
            raise RequestError(
                f"{folders[split]} and {folder} are both the {split} split: put them together, or move one elsewhere"
            )
        folders[split] = folder
    folders = folders or {"train": path}
    left_out = [folder.name for folder in flat]
    walks = {split: _walk(folder, left_out if folder == path else []) for split, folder in folders.items()}
    labels = {split: [Path(p).parts[0] for p in paths] for split, (paths, _) in walks.items()}
    if not any(labels.values()):
        raise RequestError(
            f"no images in {path}: expected <class>/*.jpg or train|val|test/<class>/*.jpg "
            f"({', '.join(sorted(SUFFIXES))})"
        )
    classes, encoded = encode_labels(labels)
    sizes = [f"{s}/{p} {_size(folders[s] / p)}" for s, (paths, _) in walks.items() for p in paths]
    splits: dict[str, tuple[Source, np.ndarray]] = {
        s: (Files(folders[s], _bytes(paths)), encoded[s]) for s, (paths, _) in walks.items()
    }
    notes = _folder_notes(flat, folders, walks, labels)
    if path not in folders.values():
        notes += [f"{f} ignored: the images are in folders" for f in sorted(path.iterdir()) if f.suffix in SHARDS]
    return Found(name, splits, classes, listing_checksum(sizes), notes=notes)


def _folder_notes(
    flat: Sequence[Path], used: Mapping[str, Path], walks: Mapping[str, Any], labels: Mapping[str, Any]
) -> list[str]:
    notes = [f"{folder} holds no class folders: not used" for folder in flat]
    for split, folder in used.items():
        ignored = walks[split][1]
        if ignored:
            notes.append(f"{len(ignored)} files ignored, not an image in a class folder: {', '.join(ignored[:5])}")
        empty = sorted(f.name for f in _subfolders(folder) if f not in flat and f.name not in labels[split])
        notes += [f"class folder {folder / name} has no images" for name in empty]
    return notes


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _walk(folder: Path, leave_out: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the images in class folders below a folder, at any depth, and the other files, as relative paths.

    Raises:
        RequestError: A folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise RequestError(f"cannot read {error.filename}: {error.strerror}")

    paths: list[str] = []
    others: list[str] = []
    for where, below, files in os.walk(folder, onerror=refuse, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith(".") and not _leads_back(where, name))
        if where == str(folder):
            below[:] = [name for name in below if name not in leave_out]
        for name in sorted(name for name in files if not name.startswith(".")):
            usable = Path(name).suffix.lower() in SUFFIXES and where != str(folder)
            (paths if usable else others).append(os.path.relpath(os.path.join(where, name), folder))
    return paths, others


def _leads_back(where: str, name: str) -> bool:
    """Return whether a folder's entry is a link to a folder that it lies in."""
    path = os.path.join(where, name)
    return os.path.islink(path) and Path(os.path.realpath(where)).is_relative_to(os.path.realpath(path))


def _bytes(names: Iterable[str]) -> np.ndarray:
    return np.array([os.fsencode(name) for name in names])


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
    sizes = [f"{p} {_size(path.parent / p)}" for paths, _ in groups.values() for p in paths]
    splits: dict[str, tuple[Source, np.ndarray]] = {
        split: (Files(path.parent, _bytes(paths)), encoded[split]) for split, (paths, _) in groups.items()
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
    if len(rows) > 1 and _size(path.parent / rows[0][1][0]) < 0 <= _size(path.parent / rows[1][1][0]):
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
    if row[column].lower() not in SPLIT_NAMES:
        raise RequestError(f"{path} line {number}: split {row[column]!r} is not train, val or test")
    return SPLIT_NAMES[row[column].lower()]


def find_parquet(path: Path, files: Sequence[Path], name: str) -> Found:
    """Return the images in parquet files as Hugging Face writes them, columns found by feature type."""
    features = _features(files[0])
    image, label = _image_column(files[0], features), _label_column(files[0], features)
    tables = {split: read_parquet(members, [image, label]) for split, members in _by_split(files, path).items()}
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


def _by_split(files: Sequence[Path], root: Path) -> dict[str, list[Path]]:
    """Return files by the split that a word of their path names (train-0.parquet, x_val.tar), else all as train."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", _below(file, root).lower())
        groups.setdefault(next((SPLIT_NAMES[word] for word in words[::-1] if word in SPLIT_NAMES), ""), []).append(
            file
        )
    unnamed = groups.pop("", [])
    if unnamed and groups:
        raise RequestError(f"{unnamed[0]}: its name holds no split (train, val, test), those of other files do")
    return groups or {"train": unnamed}


def _below(file: Path, root: Path) -> str:
    return file.name if file == root else file.relative_to(root).as_posix()


def find_tars(path: Path, files: Sequence[Path], name: str) -> Found:
    """Return the images of WebDataset shards: NAME.jpg or .png beside NAME.cls."""
    splits: dict[str, tuple[Source, np.ndarray]] = {}
    read = {split: _tar_samples(members) for split, members in _by_split(files, path).items()}
    if not any(places for places, _, _, _ in read.values()):
        raise RequestError(
            f"no samples in the tar files of {path}: expected NAME.jpg or NAME.png beside NAME.cls "
            "(images in class folders: unpack them first)"
        )
    classes, encoded = encode_labels({split: labels for split, (_, _, labels, _) in read.items()})
    for split, members in _by_split(files, path).items():
        places, names, _, _ = read[split]
        splits[split] = (Shards(members, np.array(places, np.int64).reshape(-1, 3), _bytes(names)), encoded[split])
    unlabelled = sum(count for _, _, _, count in read.values())
    notes = [f"{unlabelled} images without a .cls member ignored"] if unlabelled else []
    return Found(name, splits, classes, files_checksum(files), notes=notes)


def _tar_samples(tars: Sequence[Path]) -> tuple[list[tuple[int, int, int]], list[str], list[str], int]:
    """Return places and names of the images in shards, their labels, and how many images have none."""
    places, names, labels, unlabelled = [], [], [], 0
    for number, tar in enumerate(tars):
        for sample in index_tar(tar).values():
            images = [member for extension, member in sample.items() if f".{extension}" in SUFFIXES]
            if images and "cls" in sample:
                offset, size, name = images[0]
                places.append((number, offset, size))
                names.append(name)
                labels.append(read_range(tar, *sample["cls"][:2]).decode("utf-8", "replace").strip())
            unlabelled += bool(images) and "cls" not in sample
    return places, names, labels, unlabelled


def encode_labels(labels: Mapping[str, Sequence[str]]) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Return class names in order (by number where all are numbers) and int64 labels per split.

    Raises:
        RequestError: A class is in another split but not in train.
    """
    known = set(labels.get("train") or [label for split in labels.values() for label in split])
    numbers = all(re.fullmatch(r"-?\d+", label) for label in known)
    classes = sorted(known, key=lambda name: (int(name), name)) if numbers else sorted(known)  # "01" ties with "1"
    index = {label: i for i, label in enumerate(classes)}
    for split, names in labels.items():
        if missing := sorted(set(names) - known):
            raise RequestError(f"class {missing[0]!r} is in {split} but has no image in train")
    return tuple(classes), {s: np.array([index[n] for n in names], np.int64) for s, names in labels.items()}


def files_checksum(files: Sequence[Path]) -> str:
    """Return a hash of the files' contents, or of their names and sizes where they are very large together."""
    if sum(file.stat().st_size for file in files) > HASHED_BYTES:
        return listing_checksum([f"{file.name} {file.stat().st_size}" for file in files])
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return "sha256:" + digest.hexdigest()


def listing_checksum(lines: Iterable[str]) -> str:
    """Return a hash of a list of names and sizes."""
    return "listing-sha256:" + hashlib.sha256("\n".join(sorted(lines)).encode(errors="surrogateescape")).hexdigest()


def _shards(path: Path) -> tuple[str, list[Path]]:
    """Return ".parquet" or ".tar" and the files of that kind at or below a path, or "" where images come first."""
    if path.is_file():
        return path.suffix, [path]
    for where, below, files in os.walk(path):
        below.sort()
        for kind in SHARDS:
            if any(file.endswith(kind) for file in files):
                if Path(where) == path and _class_folders(path):
                    return "", []
                return kind, _one_configuration(path, sorted(path.rglob(f"*{kind}")))
        if any(Path(file).suffix.lower() in SUFFIXES for file in files) and Path(where) != path:
            break
    return "", []


def _class_folders(path: Path) -> bool:
    """Return whether images lie in class folders: in two or more, as one may hold the pictures of a readme."""
    folders = [c for f in _subfolders(path) for c in (_subfolders(f) if f.name.lower() in SPLIT_NAMES else [f])]
    return sum(1 for _ in itertools.islice(filter(_holds_images, folders), 2)) == 2


def _holds_images(folder: Path) -> bool:
    return any(Path(file).suffix.lower() in SUFFIXES for _, _, files in os.walk(folder) for file in files)


def _one_configuration(root: Path, files: list[Path]) -> list[Path]:
    """Return the files where all lie in one folder but for folders named after splits, else refuse."""
    folders = {"/".join(p for p in f.relative_to(root).parts[:-1] if p.lower() not in SPLIT_NAMES) for f in files}
    if len(folders) > 1:
        raise RequestError(f"{root} holds several data sets: give one of the folders {', '.join(sorted(folders))}")
    return files


def _size(path: Path) -> int:
    """Return a file's size in bytes, -1 where it is not there."""
    try:
        return path.stat().st_size if path.is_file() else -1
    except OSError:  # e.g. a name too long
        return -1
