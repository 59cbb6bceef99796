"""`Found`: the images and labels of a data set of any kind. Checking and making missing splits come later."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from convmixer.data.sources import Source
from convmixer.data.unused import Unused
from convmixer.errors import RequestError

HASHED_BYTES = 2 << 30  # above this the checksum covers names and sizes instead of contents


@dataclass(frozen=True)
class Found:
    """Images and labels as they were found.

    Args:
        name: Name of the data.
        splits: "train", "val" or "test" -> images and int64 labels; if the data have no splits, all are "train".
        classes: Class names by label.
        checksum: "sha256:..." of the contents, or "listing-sha256:..." of names and sizes.
        in_chans: Channels, if they are known without opening an image.
        notes: Notes for the user.
        unused: Files and other parts that are not used, by reason.
        spec: The data argument, made unambiguous, see `argument.Argument`.
        groups: Split -> name of each image's group; images of one group stay in one split. Empty: no groups.
        weights: Split -> float32 (N,), weight of each image in the loss; empty: all equal.
    """

    name: str
    splits: dict[str, tuple[Source, np.ndarray]]
    classes: tuple[str, ...]
    checksum: str
    in_chans: int | None = None
    notes: list[str] = field(default_factory=list)
    unused: Unused = field(default_factory=Unused)
    spec: str = ""
    groups: dict[str, Sequence[str]] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)


def files_checksum(files: Sequence[Path]) -> str:
    """Return a hash of the files' contents, or of their names and sizes if they have over 2 GiB together."""
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


def loss_weights(column: str, values: Sequence[object]) -> np.ndarray:
    """Return a column of weights as float32 (N,).

    Raises:
        RequestError: A value is not a finite number of at least 0, or all are 0.
    """
    try:
        weights = np.array([float(value) for value in values], np.float32)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        weights = np.full(1, np.nan, np.float32)
    if not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        raise RequestError(f"the weights in column {column!r} must be finite numbers of at least 0, and not all 0")
    return weights


def file_size(path: Path) -> int:
    """Return a file's size in bytes, -1 if it does not exist."""
    try:
        return path.stat().st_size if path.is_file() else -1
    except (OSError, ValueError):  # e.g. a name too long, or one with a zero byte
        return -1


def to_bytes(names: Iterable[str]) -> np.ndarray:
    """Return paths as an array of bytes, which worker processes share instead of copying."""
    return np.array([os.fsencode(name) for name in names])
