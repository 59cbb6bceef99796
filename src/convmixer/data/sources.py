"""The sources of an image set's bytes: arrays, files, parquet columns, tar shards. All have random access by index.

A source has no labels and no splits, and decodes an image only on request. `find.py` finds the sources, `splits.py`
makes the splits.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from convmixer.data.status import file_status
from convmixer.decode.load import brightest
from convmixer.preprocess import load_image, read_header

DIGESTED = 8192  # bytes at the start of a file


class Source(Protocol):
    """A numbered collection of images."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the name of an image for messages."""
        ...

    def header(self, index: int) -> tuple[str, tuple[int, int]]:
        """Return mode and (width, height) without decoding the image; raise ImageError if that fails."""
        ...

    def image(self, index: int, in_chans: int, bits: int = 16) -> Image.Image:
        """Return the decoded image as RGB or L; raise ImageError if that fails. For `bits` see `Preprocessing`."""
        ...

    def digest(self, index: int, whole: bool = False) -> int:
        """Return a 64-bit digest that is not 0: of the whole stored image, or, if it is a file longer than 8 KiB and
        not `whole`, of its size and its first 8 KiB.
        """
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
    """Base class of the sources of encoded images."""

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


class OnDisk(Encoded):
    """Base class of the sources whose images are in files on this disk, so that their headers can be cached."""

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def in_files(self) -> bool:
        """Whether the images are in files on this disk; override it if that depends on the instance."""
        return True

    def sizes_and_times(self) -> np.ndarray:
        """Return size and time of the file that each image is in, int64 (N, 2), see `file_status`."""
        raise NotImplementedError

    def identity(self) -> bytes:
        """Return bytes that only a source of the same images in the same files has."""
        raise NotImplementedError


@dataclass(frozen=True)
class Files(OnDisk):
    """Image files.

    Args:
        root: The folder that paths are relative to.
        paths: Paths as bytes, (N,): an array, because worker processes would copy a list of a million strings.
        status: Sizes and times of the files when they were found, see `file_status`; None: not known yet.
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

    def sizes_and_times(self) -> np.ndarray:
        if self.status is not None:
            return self.status
        return file_status(self.root, [self.name(index) for index in range(len(self))])

    def identity(self) -> bytes:
        return os.fsencode(os.path.abspath(self.root)) + self.paths.tobytes()


@dataclass(frozen=True)
class Column(OnDisk):
    """A parquet column of encoded images, held as Arrow memory.

    Args:
        label: Start of the images' names, e.g. "train".
        images: Binary values, or structs with a field "bytes".
        files: The parquet files that the rows are from; empty: not known.
        chosen: A text that identifies the column and the rows of the files.
    """

    label: str
    images: pa.ChunkedArray
    files: Sequence[Path] = ()
    chosen: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.label}[{index}]"

    def encoded(self, index: int) -> Path | bytes:
        data = self.images[index].as_py()
        return data or b""

    @property
    def in_files(self) -> bool:
        return bool(self.files)

    def sizes_and_times(self) -> np.ndarray:
        """Return one pair for all rows: as size, a digest of all files' sizes and times; as time, the newest."""
        status = file_status(Path(), [os.path.abspath(file) for file in self.files])
        return np.tile([digest(status.tobytes()) >> 1, status[:, 1].max()], (len(self), 1))

    def identity(self) -> bytes:
        return _names(self.files) + f"\0{self.chosen}\0{len(self)}".encode(errors="surrogateescape")


def binary_column(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column's encoded bytes, taken out of Hugging Face's struct<bytes, path> if it is one."""
    return pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values


@dataclass(frozen=True)
class Shards(OnDisk):
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

    def sizes_and_times(self) -> np.ndarray:
        return file_status(Path(), [os.path.abspath(tar) for tar in self.tars])[self.places[:, 0]]

    def identity(self) -> bytes:
        return _names(self.tars) + self.places.tobytes()


def _names(files: Sequence[Path]) -> bytes:
    return b"\0".join(os.fsencode(os.path.abspath(file)) for file in files)


def read_range(path: Path, offset: int, size: int) -> bytes:
    """Return part of a file. It is opened each time, which takes microseconds and is safe in any process."""
    with path.open("rb") as file:
        return os.pread(file.fileno(), size, offset)
