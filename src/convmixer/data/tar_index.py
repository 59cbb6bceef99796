"""Index of a tar file: the position of each member, and the texts of short members, which may be labels.

Making the index reads the header of every member, all over the file. Therefore it is kept in the cache folder, and is
valid as long as the file keeps its size and time.
"""

import contextlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convmixer.data.status import file_status, settled
from convmixer.data.walk import is_image
from convmixer.errors import RequestError
from convmixer.files import atomic_file, cached_file, prune

CACHED_FROM = 1 << 20  # bytes; the index of a smaller file is not kept, because making it is fast
CACHE_BYTES = 1 << 30  # all indexes together; beyond this the least recently used are deleted
TEXT_BYTES = 256
VERSION = 1


class Member(NamedTuple):
    """A file in a tar file.

    Args:
        offset, size: Position and size of its contents in the tar file, bytes.
        name: Its name.
        text: Its contents, if they are short and not an image; else None.
    """

    offset: int
    size: int
    name: str
    text: str | None


def index_tar(path: Path) -> dict[str, dict[str, Member]]:
    """Return the samples of a WebDataset shard in order: key -> {extension: member}.

    Raises:
        RequestError: The file is not a tar file, is compressed (no random access), or is cut short.
    """
    samples: dict[str, dict[str, Member]] = {}
    for member in _members(path):
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        found = samples.setdefault(f"{folder}/{stem}", {})
        if extension.lower() in found:
            raise RequestError(f"{path} has two members {member.name}: it is not clear which one is meant")
        found[extension.lower()] = member
    return samples


def _members(path: Path) -> list[Member]:
    status = file_status(path.parent, [path.name])
    if status[0, 0] < CACHED_FROM:
        return list(_read(path))
    cache = cached_file("tars", os.fsencode(path.absolute()), ".npz")
    with contextlib.suppress(Exception):  # missing, truncated, or of another version
        found = _load(cache, status)
        os.utime(cache)  # marks it as used
        return found
    members = list(_read(path))
    if settled(status[:, 1]).all():
        with contextlib.suppress(OSError):  # if the cache cannot be written, nothing is cached
            _save(cache, status, members)
            prune(cache.parent.glob("*.npz"), CACHE_BYTES)
    return members


def _read(path: Path) -> Iterator[Member]:
    try:
        with tarfile.open(path, "r:") as tar:
            needed = 0
            for member in tar:
                if member.isfile():
                    needed = max(needed, member.offset_data + member.size)
                    yield Member(member.offset_data, member.size, member.name, _text(tar, member))
        there = path.stat().st_size
    except (tarfile.TarError, OSError, EOFError) as error:
        raise RequestError(f"{path} is not a readable, uncompressed tar file: {error}") from error
    if needed > there:
        raise RequestError(f"{path} is cut short: its members need {needed} bytes, but it has {there}")


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str | None:
    opened = tar.extractfile(member) if member.size <= TEXT_BYTES and not is_image(member.name) else None
    text = opened.read().decode("utf-8", "replace").strip() if opened else None
    return None if text is None or "\0" in text else text  # zero bytes separate the texts in the cache


def _save(cache: Path, status: np.ndarray, members: list[Member]) -> None:
    names, texts = _joined([m.name for m in members]), _joined([m.text or "" for m in members])
    places = np.array([(m.offset, m.size, m.text is not None) for m in members], np.int64)
    with atomic_file(cache) as file:
        np.savez(file, version=np.array(VERSION), status=status, names=names, texts=texts, places=places)


def _load(cache: Path, status: np.ndarray) -> list[Member]:
    with cache.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        if int(file["version"]) != VERSION or not np.array_equal(file["status"], status):
            raise ValueError("another version, or of another file")
        names, texts = (file[name].tobytes().split(b"\0") for name in ("names", "texts"))
        places = file["places"].tolist()
    return [
        Member(offset, size, _unpacked(name), _unpacked(text) if short else None)
        for (offset, size, short), name, text in zip(places, names, texts, strict=True)
    ]


def _joined(texts: list[str]) -> np.ndarray:
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), np.uint8)


def _unpacked(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")
