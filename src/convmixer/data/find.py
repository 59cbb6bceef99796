"""Finds the images, labels, splits and class names that a data argument stands for. Decodes no image."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from convmixer.data.argument import ARCHIVES, HUB, SHARDS, TABLES, read_argument
from convmixer.data.folder import count_class_folders, find_folder
from convmixer.data.found import Found
from convmixer.data.hub import download
from convmixer.data.labels import split_of
from convmixer.data.options import Options
from convmixer.data.parquet import find_parquet
from convmixer.data.remote import fetch_shards
from convmixer.data.shards import find_tars
from convmixer.data.sources import Arrays
from convmixer.data.table import find_table
from convmixer.data.walk import Walk, walk
from convmixer.errors import RequestError
from convmixer.files import cache_folder

NOT_READ = "next to the shards that are read"


def find(spec: str, recorded: bool = False, options: Options | None = None) -> Found:
    """Return the images and labels that a data argument stands for.

    Args:
        spec, recorded: See `argument.read_argument`.
        options: What the user said about columns, folders and groups.

    Raises:
        RequestError: Nothing usable is there; the message says what to do.
    """
    argument, options = read_argument(spec, recorded), options or Options()
    if argument.spec == "digits":
        options.check_used("the data set digits", "group")
        found = find_digits()
    elif argument.url:
        found = _find_remote(argument.url, recorded, options or Options())
    else:
        path = argument.path or download(argument) / argument.inside
        found = find_path(path, options, argument.repository and spec.removeprefix(HUB), not argument.repository)
    return replace(found, spec=argument.spec, notes=[*argument.notes, *found.notes])


def find_path(path: Path, options: Options, name: str | None = None, own_disk: bool = True) -> Found:
    """Return the images and labels in a file or folder of any supported kind.

    Args:
        path: The file or folder.
        options: What the user said about columns, folders and groups.
        name: Name of the data; None: that of the path.
        own_disk: See `find_parquet`.
    """
    name = name or path.resolve().name
    kind = path.suffix.lower()
    if kind in TABLES and path.is_file():
        return find_table(path, name, options)
    if path.is_file():
        if path.name.lower().endswith(ARCHIVES):
            raise RequestError(f"{path} is a compressed archive: unpack it, and give the folder")
        if kind not in SHARDS:
            raise RequestError(f"{path} is not a data set: give a folder, or a .csv, .tsv, .tar or .parquet file")
        return _read_shards(path, kind, [path], name, options, own_disk)
    walked = walk(path)
    for kind in SHARDS:
        files = [file for file in walked.files if file.lower().endswith(kind)]
        if files and count_class_folders(walked.files) < 2:  # one class folder may just hold the pictures of a readme
            return _find_shards(walked, kind, files, name, options, own_disk)
    options.check_used(f"{path}, a folder whose class folders are the labels,", "group")
    return find_folder(walked, name)


def _find_remote(url: str, recorded: bool, options: Options) -> Found:
    files, kind, notes = fetch_shards(url, recorded)
    root = cache_folder("shards")
    name = re.split(r"[?#]", url)[0].rstrip("/").rpartition("/")[2]
    found = _read_shards(root, kind, files, name, options, own_disk=False)
    return replace(found, notes=[*notes, *found.notes])


def _read_shards(path: Path, kind: str, files: Sequence[Path], name: str, options: Options, own_disk: bool) -> Found:
    if kind == ".parquet":
        return find_parquet(path, files, name, options, own_disk)
    options.check_used(f"{path}, tar shards,", "path_column", "label_column", "group")
    return find_tars(path, files, name, options)


def _find_shards(walked: Walk, kind: str, files: Sequence[str], name: str, options: Options, own_disk: bool) -> Found:
    paths = [walked.root / file for file in _one_configuration(walked.root, files)]
    found = _read_shards(walked.root, kind, paths, name, options, own_disk)
    taken = set(files)
    found.unused.add(NOT_READ, *(file for file in walked.files if file not in taken))
    found.unused.update(walked.unused)
    return found


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


def _one_configuration(root: Path, files: Sequence[str]) -> Sequence[str]:
    """Return the files if, apart from split folders, all are in one folder; else raise RequestError."""
    folders = {"/".join(p for p in file.split("/")[:-1] if not split_of(p)[0]) for file in files}
    if len(folders) > 1:
        raise RequestError(f"{root} holds several data sets: give one of the folders {', '.join(sorted(folders))}")
    return sorted(files, key=lambda file: file.split("/"))
