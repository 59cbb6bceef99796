"""Keeps decoded images, in memory or in a file that all worker processes share.

Every image is checked when it is read. An image that is half written, or damaged on disk, is decoded again.
"""

import contextlib
import math
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from convmixer.data.sources import Source
from convmixer.files import cached_file, temporary_name

Fit = Callable[[Image.Image], Image.Image]
SUFFIX = ".images"
_ENTRY = np.dtype([("crc", np.uint32), ("width", np.uint32), ("height", np.uint32)])  # crc 0: the slot is empty


class Slots:
    """One slot per image number. Forked processes share the slots; with a file, all processes do.

    Args:
        sizes: int64 (N,), size of each slot in bytes; 0: no image fits.
        file: The file that holds the slots; None: they are in memory.

    Raises:
        OSError: There is no room.
    """

    def __init__(self, sizes: np.ndarray, file: Path | None = None) -> None:
        ends = np.cumsum(sizes, dtype=np.int64)
        self._starts, self._sizes = ends - sizes, np.asarray(sizes, np.int64)
        head = len(sizes) * _ENTRY.itemsize
        self.nbytes = int(np.sum(sizes))
        room = _open(file, head + self.nbytes) if file else mmap.mmap(-1, max(1, head + self.nbytes))
        self._entries = np.frombuffer(room, _ENTRY, len(sizes))
        self._bytes = np.frombuffer(room, np.uint8, offset=head)

    def get(self, index: int, channels: int) -> np.ndarray | None:
        """Return an image as uint8 (H, W) or (H, W, channels), or None if it is not there."""
        crc, width, height = self._entries[index].tolist()
        size = width * height * channels
        if not crc or not 0 < size <= self._sizes[index]:
            return None
        start = self._starts[index]
        pixels: np.ndarray = self._bytes[start : start + size].copy()  # check and use one copy
        if _digest(pixels, width, height) != crc:
            return None
        return pixels.reshape((height, width) if channels == 1 else (height, width, channels))

    def put(self, index: int, pixels: np.ndarray) -> None:
        """Keep an image if it fits."""
        if not 0 < pixels.size <= self._sizes[index]:
            return
        height, width = pixels.shape[:2]
        start, flat = self._starts[index], pixels.reshape(-1)
        self._bytes[start : start + pixels.size] = flat
        self._entries[index] = (_digest(flat, width, height), width, height)


def slots_bytes(sizes: np.ndarray, channels: int) -> int:
    """Return the size of each slot in bytes for images of these (width, height), int (N, 2)."""
    return len(sizes) * _ENTRY.itemsize + int(sizes.prod(axis=1, dtype=np.int64).sum()) * channels


def _digest(pixels: np.ndarray, width: int, height: int) -> int:
    return zlib.crc32(pixels.tobytes(), zlib.crc32(struct.pack("<II", width, height))) or 1


def _open(file: Path, size: int) -> mmap.mmap:
    """Map a file of `size` bytes; if it is missing or of another size, create it with zeros."""
    if not file.is_file() or file.stat().st_size != size:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(file)
        try:
            with temporary.open("wb") as new:
                _fill(new, size)  # a full disk is noticed now; later it would kill the process
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    with file.open("r+b") as opened:
        os.utime(file)  # the least recently used files are deleted first
        return mmap.mmap(opened.fileno(), size)


def _fill(file: BinaryIO, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, 1 << 20):
        file.write(bytes(min(1 << 20, size - start)))


class Cached:
    """A source that keeps what it has decoded.

    Args:
        source: The images.
        in_chans: 1 or 3.
        sizes: int (N, 2), (width, height) of each image as it is kept, or (height, width); 0: the image is not kept.
        fit: Function that is applied to each decoded image, whether or not the image is kept; None: no function.
        file: File to keep the images in; None: memory.
        stored: Whether to keep images.

    Raises:
        OSError: There is no room for the images.
    """

    def __init__(
        self,
        source: Source,
        in_chans: int,
        sizes: np.ndarray,
        fit: Fit | None = None,
        file: Path | None = None,
        stored: bool = True,
    ) -> None:
        self._state = {"source": source, "in_chans": in_chans, "sizes": sizes, "fit": fit, "file": file}
        self._state["stored"] = stored
        self.source, self.in_chans, self.fit = source, in_chans, fit
        self._slots = Slots(np.prod(sizes, axis=1, dtype=np.int64) * in_chans, file) if stored else None

    @property
    def nbytes(self) -> int:
        """Return the size of the pixels, bytes."""
        return self._slots.nbytes if self._slots else 0

    def __getstate__(self) -> dict[str, Any]:
        return self._state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # in memory, each spawned worker starts with an empty cache

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def header(self, index: int) -> tuple[str, tuple[int, int]]:
        return self.source.header(index)

    def digest(self, index: int, whole: bool = False) -> int:
        return self.source.digest(index, whole)

    def image(self, index: int, in_chans: int, bits: int = 16) -> Image.Image:
        slots = self._slots if in_chans == self.in_chans else None
        if slots and (pixels := slots.get(index, in_chans)) is not None:
            return Image.fromarray(pixels)
        image = self.source.image(index, in_chans, bits)
        if self.fit:
            image = self.fit(image)
        if slots:
            slots.put(index, np.asarray(image))
        return image


def shrink(image: Image.Image, side: int) -> Image.Image:
    """Return an image whose shorter side has at most `side` pixels."""
    size = shrunk(image.size, side)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def shrunk(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the (width, height) of an image after `shrink`."""
    short = min(size)
    if short <= side:
        return size
    width, height = (max(side, round(length * side / short)) for length in size)
    return width, height


def least_side(img_size: int, scale: tuple[float, float], ratio: tuple[float, float]) -> int:
    """Return the shorter side, in pixels, of an image whose smallest random crop still has img_size pixels a side."""
    stretch = max(ratio[1], 1 / ratio[0])
    return math.ceil(img_size * math.sqrt(stretch / min(scale[0], 1.0)))


def cache_file(parts: Sequence[object]) -> Path:
    """Return the file for decoded images; `parts` are the state of the data and how the images were made."""
    return cached_file("images", "\n".join(map(str, parts)).encode(errors="surrogateescape"), SUFFIX)


def make_room(file: Path, size: int, share: float) -> bool:
    """Return whether a file fits into a share of the free disk, after deleting older files of the same kind."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file() and file.stat().st_size == size:
        return True
    others = sorted(file.parent.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime)
    while size > share * _free(file.parent) and others:
        with contextlib.suppress(OSError):
            others.pop(0).unlink()
    return size <= share * _free(file.parent)


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free
