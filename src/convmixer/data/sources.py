"""The sources of an image set's bytes: arrays, files, parquet columns, tar shards. All have random access by index.

A source knows nothing about labels or splits, and decodes only on request. `find.py` finds the sources, `splits.py`
makes the splits.
"""

import hashlib
import math
import mmap
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from convmixer.decode.load import brightest
from convmixer.preprocess import load_image, read_header

DIGESTED = 8192  # bytes at the start of a file


class Source(Protocol):
    """A numbered collection of images."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return what to call an image in a message."""
        ...

    def header(self, index: int) -> tuple[str, tuple[int, int]]:
        """Return mode and (width, height) without decoding; ImageError if that fails."""
        ...

    def image(self, index: int, in_chans: int, bits: int = 16) -> Image.Image:
        """Return the decoded image as RGB or L, `bits` as in Preprocessing; ImageError if that fails."""
        ...

    def digest(self, index: int, whole: bool = False) -> int:
        """Return a 64-bit digest, not 0, of the stored image, or of its size and first 8 KiB if that is less."""
        ...


@dataclass(frozen=True)
class Arrays:
    """Decoded images of one size.

    Args:
        pixels: uint8, (N, H, W) grey or (N, H, W, 3).
        names: N names.
    """

    pixels: np.ndarray
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return self.names[index]

    def digest(self, index: int, whole: bool = False) -> int:
        return digest(self.pixels[index].tobytes())

    def header(self, index: int) -> tuple[str, tuple[int, int]]:
        height, width = self.pixels.shape[1:3]
        return "L" if self.pixels.ndim == 3 else "RGB", (width, height)

    def image(self, index: int, in_chans: int, bits: int = 16) -> Image.Image:
        image = Image.fromarray(self.pixels[index])
        mode = "L" if in_chans == 1 else "RGB"
        return image if image.mode == mode else image.convert(mode)


def digest(data: bytes) -> int:
    """Return a 64-bit digest of bytes, never 0."""
    return int.from_bytes(_blake(data).digest(), "little") or 1


def _blake(data: bytes = b"") -> Any:
    return hashlib.blake2b(data, digest_size=8)


class Encoded:
    """Methods that all sources of encoded images share."""

    def brightest(self, index: int) -> int:
        """Return the largest value of an image of 16-bit or 32-bit integers; 0 for other images."""
        return brightest(self.encoded(index))

    def encoded(self, index: int) -> Path | bytes:
        raise NotImplementedError

    def name(self, index: int) -> str:
        raise NotImplementedError

    def header(self, index: int) -> tuple[str, tuple[int, int]]:
        return read_header(self.encoded(index))

    def digest(self, index: int, whole: bool = False) -> int:
        data = self.encoded(index)
        if isinstance(data, bytes):
            return digest(data)
        with data.open("rb") as file:
            if whole:
                return int.from_bytes(hashlib.file_digest(file, _blake).digest(), "little") or 1
            return digest(os.fstat(file.fileno()).st_size.to_bytes(8, "little") + file.read(DIGESTED))

    def image(self, index: int, in_chans: int, bits: int = 16) -> Image.Image:
        return load_image(self.encoded(index), in_chans, bits)


@dataclass(frozen=True)
class Files(Encoded):
    """Image files.

    Args:
        root: The folder that paths are relative to.
        paths: Paths as bytes, (N,): an array, because worker processes would copy a list of a million strings.
        status: Their sizes and times when they were found, see `file_status`; None: not asked for yet.
    """

    root: Path
    paths: np.ndarray
    status: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    def encoded(self, index: int) -> Path | bytes:
        return self.root / self.name(index)


@dataclass(frozen=True)
class Column(Encoded):
    """A parquet column of encoded images, held as Arrow memory.

    Args:
        label: Start of the images' names, e.g. "train".
        images: Binary values, or structs with a field "bytes".
    """

    label: str
    images: pa.ChunkedArray

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.label}[{index}]"

    def encoded(self, index: int) -> Path | bytes:
        data = self.images[index].as_py()
        return data or b""


def binary_column(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column's encoded bytes, taken out of Hugging Face's struct<bytes, path> if it is one."""
    return pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values


@dataclass(frozen=True)
class Shards(Encoded):
    """Members of uncompressed tar files.

    Args:
        tars: The files.
        places: int64 (N, 3): index into `tars`, offset and size in bytes.
        names: Member names as bytes, (N,).
    """

    tars: Sequence[Path]
    places: np.ndarray
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        return f"{self.tars[self.places[index, 0]].name}:{os.fsdecode(self.names[index])}"

    def encoded(self, index: int) -> Path | bytes:
        tar, offset, size = self.places[index]
        return read_range(self.tars[tar], int(offset), int(size))


def read_range(path: Path, offset: int, size: int) -> bytes:
    """Return part of a file; opened anew each time, which costs microseconds and is safe in any process."""
    with path.open("rb") as file:
        return os.pread(file.fileno(), size, offset)


class Cached:
    """A source of small images of one size that keeps what it has decoded, for all worker processes together.

    The memory is an anonymous shared map, inherited by forked workers and filled as images are first read. Each image
    is stored with its CRC-32, so that one being written by another process is decoded again instead of half read.

    Args:
        source: The images.
        in_chans: 1 or 3.
        size: (width, height) of the images; others are served uncached.
    """

    def __init__(self, source: Source, in_chans: int, size: tuple[int, int]) -> None:
        self.source, self.in_chans, self.size = source, in_chans, size
        self._allocate()

    @property
    def nbytes(self) -> int:
        """Return the size of the pixels, bytes."""
        return self._pixels.nbytes

    def _allocate(self) -> None:
        shape = (len(self.source), self.size[1], self.size[0]) + ((3,) if self.in_chans == 3 else ())
        self._pixels = np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
        self._crc = np.frombuffer(mmap.mmap(-1, 4 * len(self.source)), np.uint32)  # 0: not there

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "in_chans": self.in_chans, "size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # each spawned worker starts with an empty cache

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def header(self, index: int) -> tuple[str, tuple[int, int]]:
        return self.source.header(index)

    def digest(self, index: int, whole: bool = False) -> int:
        return self.source.digest(index, whole)

    def image(self, index: int, in_chans: int, bits: int = 16) -> Image.Image:
        if in_chans != self.in_chans:
            return self.source.image(index, in_chans, bits)
        pixels = self._pixels[index].copy()  # checked and used from one copy
        if self._crc[index] and self._crc[index] == zlib.crc32(pixels):
            return Image.fromarray(pixels)
        image = self.source.image(index, in_chans, bits)
        if image.size == self.size:
            self._pixels[index] = np.asarray(image)
            self._crc[index] = zlib.crc32(self._pixels[index])
        return image
