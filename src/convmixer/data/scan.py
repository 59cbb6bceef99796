"""Reads the header of every image before training, and a digest that identifies copies, but no pixels.

If there are many files, headers and digests are kept in the cache folder. A second start then asks only for the size
and time of each file or shard, and reads only files that have changed.
"""

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convmixer.data.sources import Arrays, Column, OnDisk, Shards, Source
from convmixer.data.status import settled
from convmixer.files import atomic_file, cached_file, prune
from convmixer.preprocess import ImageError
from convmixer.progress import track

Header = tuple[str, tuple[int, int]]  # mode, (width, height)
CACHED_FROM = 1000  # headers of fewer files are not kept, because reading them is fast
CACHE_BYTES = 1 << 30  # all scans together; beyond this the least recently used are deleted
PART = 256


@dataclass(frozen=True)
class Scan:
    """Headers and digests of the images of a source.

    Args:
        headers: The header of each image, or the reason why it cannot be read.
        digests: uint64 (N,): digests of the images, see `Source.digest`; 0 if an image cannot be read.
        kept: Their place in the cache; None: they are not cached.
    """

    headers: list[Header | str]
    digests: np.ndarray
    kept: "_Kept | None" = None

    def bad(self) -> np.ndarray:
        """Return which images cannot be read, bool (N,)."""
        return np.array([isinstance(header, str) for header in self.headers], bool)


def scan(source: Source) -> Scan:
    """Return header and digest of every image, with a progress bar if it takes long."""
    if isinstance(source, Arrays):
        digests = np.array([source.digest(i) for i in range(len(source))], np.uint64)
        return Scan([source.header(0)] * len(source) if len(source) else [], digests)
    kept = (
        _Kept.load(source) if isinstance(source, OnDisk) and source.in_files and len(source) >= CACHED_FROM else None
    )
    headers: list[Header | str] = [""] * len(source)
    digests = np.zeros(len(source), np.uint64)
    if kept:
        headers, digests = kept.found()

    def check(index: int) -> tuple[Header | str, int]:
        try:
            return source.header(index), source.digest(index)
        except (ImageError, OSError) as error:
            return str(error), 0

    todo = np.flatnonzero(~kept.valid) if kept else np.arange(len(source))
    parts = [todo[start : start + PART].tolist() for start in range(0, len(todo), PART)]
    # threads wait for the disk; sources in memory are faster without them
    with ThreadPoolExecutor(1 if isinstance(source, Column) else 8) as pool:
        results = pool.map(lambda part: [check(index) for index in part], parts)
        checked = track(results, "checking images", len(parts), shown_from=80)
        for part, pairs in zip(parts, checked, strict=True):
            for index, (header, digest) in zip(part, pairs, strict=True):
                headers[index], digests[index] = header, digest
    if kept and len(todo):
        kept.keep(headers, digests)
        kept.save()
    return Scan(headers, digests, kept)


class _Kept:
    """The headers and digests of images in the cache, each valid while its file keeps its size and time.

    Args:
        source: The images.
        table: Arrays of an earlier scan by name; None: there was none.
    """

    def __init__(self, source: OnDisk, table: dict[str, np.ndarray] | None) -> None:
        self.source, self.status, self.changed = source, source.sizes_and_times(), False
        count = len(source)
        self.table = table or {name: np.full(count, -1 if name == "mode" else 0, kind) for name, kind in _COLUMNS}
        size, time = self.status.T
        self.valid = (self.table["mode"] >= 0) & (self.table["size"] == size) & (self.table["time"] == time)
        self.table["whole"][~self.valid] = 0

    @classmethod
    def load(cls, source: OnDisk) -> "_Kept":
        """Return the cached headers and digests; none if the cache is damaged or belongs to other files."""
        try:
            os.utime(path := cls._file(source))  # marks it as used
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                table = {name: file[name].astype(kind) for name, kind in _COLUMNS} | {"modes": file["modes"]}
        except Exception:  # missing, truncated, or of another version
            return cls(source, None)
        whole = all(len(table[name]) == len(source) for name, _ in _COLUMNS)
        return cls(source, table if whole else None)

    def found(self) -> tuple[list[Header | str], np.ndarray]:
        """Return headers and digests; those that are no longer valid are placeholders."""
        t = self.table
        modes = [str(mode) for mode in t.get("modes", ())] or [""]
        sizes = zip(t["width"].tolist(), t["height"].tolist(), strict=True)
        headers: list[Header | str] = [(modes[m], wh) for m, wh in zip(t["mode"].tolist(), sizes, strict=True)]
        return headers, t["digest"].copy()

    def keep(self, headers: list[Header | str], digests: np.ndarray) -> None:
        """Keep a scan for the next start, except for unreadable images and files that changed in the last moments."""
        modes = sorted({header[0] for header in headers if not isinstance(header, str)})
        numbers = {mode: number for number, mode in enumerate(modes)}
        flat = [(-1, 0, 0) if isinstance(h, str) else (numbers[h[0]], *h[1]) for h in headers]
        mode, width, height = np.array(flat, np.int64).T
        size, time = self.status.T
        mode = np.where(settled(time), mode, -1)
        columns = {"mode": mode, "width": width, "height": height, "size": size, "time": time, "digest": digests}
        self.table |= {name: columns[name].astype(kind) for name, kind in _COLUMNS if name in columns}
        self.table["modes"] = np.array(modes)
        self.changed = True

    def save(self) -> None:
        """Write the cache if it has changed; if it cannot be written, nothing is cached."""
        if not self.changed:
            return
        path = self._file(self.source)
        with contextlib.suppress(OSError), atomic_file(path) as file:
            np.savez(file, **self.table)  # type: ignore[arg-type]  # its stubs know no names of arrays
        prune(path.parent.glob("*.npz"), CACHE_BYTES)
        self.changed = False

    def digest_whole(self, index: int) -> int:
        """Return the digest of a file's whole contents, read once."""
        if not self.table["whole"][index]:
            self.table["whole"][index] = self.source.digest(index, whole=True)
            self.changed = True
        return int(self.table["whole"][index])

    @staticmethod
    def _file(source: OnDisk) -> Path:
        return cached_file("headers", source.identity(), ".npz")


_COLUMNS = (
    ("size", np.int64),
    ("time", np.int64),
    ("mode", np.int16),
    ("width", np.int32),
    ("height", np.int32),
    ("digest", np.uint64),
    ("whole", np.uint64),  # 0: not read
)


def copies(sources: Sequence[Source], scans: Sequence[Scan]) -> list[np.ndarray]:
    """Return for each source a number per image, int64 (N,), the same for equal images; -1 if unreadable.

    Args:
        sources: The images.
        scans: Their scans. Long files with the same digest are read completely here.
    """
    joined = np.concatenate([part.digests for part in scans]) if scans else np.empty(0, np.uint64)
    start = np.cumsum([0, *(len(part.digests) for part in scans)])
    _, inverse, counts = np.unique(joined, return_inverse=True, return_counts=True)
    several = (counts[inverse] > 1) & (joined != 0)
    for source, part, first in zip(sources, scans, start[:-1], strict=True):
        if not isinstance(source, (Arrays, Column, Shards)):  # their digests cover the whole contents
            for index in np.flatnonzero(several[first : first + len(part.digests)]):
                joined[first + index] = _digest_whole(source, part.kept, int(index))
            if part.kept:
                part.kept.save()
    _, first, inverse = np.unique(joined, return_index=True, return_inverse=True)
    numbers = first[inverse]  # an image's number is the index of its first copy
    numbers[joined == 0] = -1
    return np.split(numbers, start[1:-1])


def _digest_whole(source: Source, kept: _Kept | None, index: int) -> int:
    try:
        return kept.digest_whole(index) if kept else source.digest(index, whole=True)
    except OSError:  # the file was deleted; reading the image will report it
        return 0
