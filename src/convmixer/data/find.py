"""What a data argument means: finds the images, labels, splits and class names behind it. Decodes no image."""

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from convmixer.data.sources import Arrays, Column, Files, Shards, Source, binary_column, index_tar, read_text
from convmixer.errors import RequestError

HUB_NAMES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
STATISTICS = {  # mean and standard deviation per channel of the training images
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
EXTENSIONS = {
    ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".jp2", ".avif",
}  # fmt: skip
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
    """

    name: str
    splits: dict[str, tuple[Source, np.ndarray]]
    classes: tuple[str, ...]
    checksum: str
    in_chans: int | None = None
    notes: list[str] = field(default_factory=list)


def find(spec: str) -> Found:
    """Return the images and labels behind a data argument.

    Args:
        spec: "digits", "cifar10", "cifar100", a path (folder, .csv, .tar, .parquet) or a hub name "owner/name".

    Raises:
        RequestError: Nothing usable is there; the message says what to do.
    """
    if spec == "digits":
        return find_digits()
    path = Path(spec).expanduser()
    if path.exists() and spec not in HUB_NAMES:
        return find_path(path)
    if spec in HUB_NAMES:
        local = [place for place in _places(spec) if place.is_dir()]
        return find_path(local[0] if local else _download(spec, HUB_NAMES[spec]), spec)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not spec.startswith("."):
        return find_path(_download(spec, spec), spec)
    raise RequestError(
        f"no data {spec!r}: give digits, cifar10, cifar100, an existing folder, .csv, .tar or .parquet file, "
        "or a hub name owner/name"
    )


def find_path(path: Path, name: str | None = None) -> Found:
    """Return the images and labels in a file or folder, by what it holds."""
    name = name or path.resolve().name
    if path.suffix.lower() in (".csv", ".tsv"):
        return find_csv(path, name)
    if path.is_file() and path.suffix not in (".tar", ".parquet"):
        raise RequestError(f"{path} is not a data set: give a folder, or a .csv, .tsv, .tar or .parquet file")
    if parquet := _files(path, ".parquet"):
        return find_parquet(path, parquet, name)
    if tars := _files(path, ".tar"):
        return find_tars(path, tars, name)
    return find_folder(path, name)


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
    """Return the images of a folder `<split>/<class>/*` or `<class>/*`."""
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    splits = {SPLIT_NAMES[f.name.lower()]: f for f in folders if f.name.lower() in SPLIT_NAMES and _subfolders(f)}
    splits = splits or {"train": path}
    found, labels, others, sizes = {}, {}, 0, []
    for split, folder in splits.items():
        paths, labels[split], ignored, size = _walk(folder)
        found[split] = Files(folder, paths)
        others += ignored
        sizes += [f"{split}/{p} {s}" for p, s in zip(paths, size, strict=True)]
    if not any(labels.values()):
        raise RequestError(
            f"no images in {path}: expected <class>/*.jpg or train|val|test/<class>/*.jpg "
            f"({', '.join(sorted(EXTENSIONS))})"
        )
    classes, encoded = encode_labels(labels)
    notes = [f"{others} files without an image extension ignored"] if others else []
    notes += [f"class {c!r} of {s} has no images" for s, folder in splits.items() for c in _empty(folder, labels[s])]
    return Found(name, {s: (found[s], encoded[s]) for s in splits}, classes, listing_checksum(sizes), notes=notes)


def _subfolders(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _empty(folder: Path, labels: Sequence[str]) -> list[str]:
    used = set(labels)
    return sorted(entry.name for entry in _subfolders(folder) if entry.name not in used)


def _walk(folder: Path) -> tuple[list[str], list[str], int, list[int]]:
    """Return image paths below a folder, the first part of each as its class, ignored files, and sizes in bytes."""
    paths, others = [], 0
    for where, below, files in os.walk(folder, followlinks=True):
        below[:] = sorted(b for b in below if not b.startswith("."))
        if Path(where) == folder:
            continue  # images outside any class folder have no label
        for file in sorted(f for f in files if not f.startswith(".")):
            if Path(file).suffix.lower() in EXTENSIONS:
                paths.append(os.path.relpath(os.path.join(where, file), folder))
            else:
                others += 1
    return paths, [Path(p).parts[0] for p in paths], others, [os.stat(folder / p).st_size for p in paths]


def find_csv(path: Path, name: str) -> Found:
    """Return the images named by a table of path, label and, where there is one, split."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        rows = [[cell.strip() for cell in row] for row in csv.reader(file, delimiter=delimiter) if any(row)]
    columns = _columns(rows[0]) if rows else {}
    body = rows[1:] if columns else rows
    columns = columns or {"path": 0, "label": 1, "split": 2}
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for number, row in enumerate(body, 2 if body is not rows else 1):
        if len(row) <= max(columns["path"], columns["label"]) or not row[columns["path"]]:
            raise RequestError(f"{path} line {number}: expected path,label, found {','.join(row)!r}")
        group = groups.setdefault(_split_of(row, columns, path, number), ([], []))
        group[0].append(row[columns["path"]])
        group[1].append(row[columns["label"]])
    if not groups:
        raise RequestError(f"{path} names no images: expected lines of path,label")
    classes, encoded = encode_labels({split: labels for split, (_, labels) in groups.items()})
    root = path.parent
    sizes = [f"{p} {_size(root / p)}" for paths, _ in groups.values() for p in paths]
    checksum = listing_checksum([hashlib.sha256(path.read_bytes()).hexdigest(), *sizes])
    splits: dict[str, tuple[Source, np.ndarray]] = {
        split: (Files(root, paths), encoded[split]) for split, (paths, _) in groups.items()
    }
    return Found(name, splits, classes, checksum)


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


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def find_parquet(path: Path, files: Sequence[Path], name: str) -> Found:
    """Return the images in parquet files as Hugging Face writes them, columns found by feature type."""
    features = _features(files[0])
    image, label = _image_column(files[0], features), _label_column(files[0], features)
    splits: dict[str, tuple[Source, Any]] = {}
    for split, members in _by_split(files).items():
        table = pa.concat_tables([pq.read_table(file, columns=[image, label]) for file in members])
        splits[split] = (Column(split, binary_column(table[image])), table[label])
    names = features.get(label, {}).get("names")
    classes, labels = _parquet_labels({split: column for split, (_, column) in splits.items()}, names)
    notes, kept = [], {}
    for split, (source, _) in splits.items():
        if len(labels[split]) and (labels[split] < 0).all():
            notes.append(f"split {split} has no labels (all -1): not used")
        else:
            kept[split] = (source, labels[split])
    if any((labels[split] < 0).any() for split in kept):
        raise RequestError(f"{path}: some images have label -1 (none); remove them")
    return Found(name, kept, classes, files_checksum(files), notes=notes)


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
    found = found or [column.name for column in schema if pa.types.is_integer(column.type)]
    preferred = ("label", "labels", "fine_label", "class", "target")
    found = found or [column.name for column in schema if column.name in preferred]
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
    columns: Mapping[str, Any], names: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, Any]]:
    if names is None:
        return encode_labels({split: [str(v) for v in column.to_pylist()] for split, column in columns.items()})
    labels = {split: column.to_numpy().astype(np.int64) for split, column in columns.items()}
    return tuple(names), labels


def _by_split(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return files by the split that their names begin with (`train-00000.parquet`); without any, all are train."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        start = re.split(r"[^a-z]", file.name.lower(), maxsplit=1)[0]
        groups.setdefault(SPLIT_NAMES.get(start, ""), []).append(file)
    unnamed = groups.pop("", [])
    if unnamed and groups:
        raise RequestError(f"{unnamed[0]}: the name begins with no split (train-, val-, test-) but others do")
    return groups or {"train": unnamed}


def find_tars(path: Path, files: Sequence[Path], name: str) -> Found:
    """Return the images of WebDataset shards: NAME.jpg or .png beside NAME.cls."""
    groups: dict[str, list[tuple[int, int, int, str]]] = {}
    labels: dict[str, list[str]] = {}
    unlabelled = 0
    for split, members in _by_split(files).items():
        for file in members:
            for sample in index_tar(file).values():
                image = next((v for k, v in sample.items() if "." + k in EXTENSIONS), None)
                if image is None or "cls" not in sample:
                    unlabelled += image is not None
                    continue
                groups.setdefault(split, []).append((list(files).index(file), *image))
                labels.setdefault(split, []).append(read_text(file, *sample["cls"][:2]))
    if not groups:
        raise RequestError(f"no samples in {path}: expected NAME.jpg or NAME.png beside NAME.cls in the tar files")
    classes, encoded = encode_labels(labels)
    splits: dict[str, tuple[Source, np.ndarray]] = {s: (Shards(files, m), encoded[s]) for s, m in groups.items()}
    notes = [f"{unlabelled} images without a .cls member ignored"] if unlabelled else []
    return Found(name, splits, classes, files_checksum(files), notes=notes)


def encode_labels(labels: Mapping[str, Sequence[str]]) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Return class names in order (by number where all are numbers) and int64 labels per split.

    Raises:
        RequestError: A class is in another split but not in train.
    """
    known = set(labels.get("train") or [label for split in labels.values() for label in split])
    numbers = all(re.fullmatch(r"-?\d+", label) for label in known)
    classes = sorted(known, key=int) if numbers else sorted(known)
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
    return "listing-sha256:" + hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _files(path: Path, suffix: str) -> list[Path]:
    """Return the files with a suffix: the path itself, or those in the folder, its `data` folder or its only one."""
    if path.is_file():
        return [path] if path.suffix.lower() == suffix else []
    for folder in (path, path / "data", *_subfolders(path)):
        if found := sorted(folder.glob(f"*{suffix}")):
            return found
    return []


def _places(name: str) -> list[Path]:
    roots = [os.environ.get("CONVMIXER_DATA"), "../shared/data", "data"]
    return [Path(root) / name for root in roots if root]


def _download(spec: str, repo: str) -> Path:
    """Return the local copy of a hub data set's parquet files, fetched where needed."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=["*.parquet", "**/*.parquet"]))
    except Exception as error:  # the hub raises many kinds: no network, no such name, not allowed
        places = ", ".join(str(place) for place in _places(spec)) if spec in HUB_NAMES else "a folder"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(
            f"data {spec!r} are not here and cannot be downloaded from the hub ({repo}): {reason}. "
            f"Put the parquet files in {places}"
        ) from error
