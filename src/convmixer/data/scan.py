"""Reads from every image before training its header, and a digest that identifies copies. No pixels.

The headers of image files are kept in the cache folder, so that a second start reads only what has changed since.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convmixer.data.sources import Arrays, Files, Shards, Source
from convmixer.files import atomic_file, cache_folder
from convmixer.preprocess import ImageError
from convmixer.progress import track

Header = tuple[str, tuple[int, int]]  # mode, (width, height)
CACHED_FROM = 1000  # files; fewer are read quickly without a cache
PART = 256


@dataclass(frozen=True)
class Scan:
    """What the scan found out about the images of a source.

    Args:
        headers: The header of each image, or why it cannot be read.
        digests: uint64 (N,): of the contents, or of size and first 8 KiB if the file is longer; 0 if unreadable.
    """

    headers: list[Header | str]
    digests: np.ndarray

    def bad(self) -> np.ndarray:
        """Return which images cannot be read, bool (N,)."""
        return np.array([isinstance(header, str) for header in self.headers], bool)


def scan(source: Source) -> Scan:
    """Return header and digest of every image, with a progress bar if it takes long."""
    if isinstance(source, Arrays):
        digests = np.array([source.digest(i) for i in range(len(source))], np.uint64)
        return Scan([source.header(0)] * len(source) if len(source) else [], digests)
    known = _Known.load(source) if isinstance(source, Files) and len(source) >= CACHED_FROM else None

    def check(index: int) -> tuple[Header | str, int]:
        try:
            return (known and known.get(index)) or (source.header(index), source.digest(index))
        except (ImageError, OSError) as error:
            return str(error), 0

    parts = [range(start, min(start + PART, len(source))) for start in range(0, len(source), PART)]
    # threads wait for the disk; sources in memory are faster without them
    with ThreadPoolExecutor(8 if isinstance(source, (Files, Shards)) else 1) as pool:
        results = pool.map(lambda part: [check(index) for index in part], parts)
        done = [pair for part in track(results, "checking images", len(parts), shown_from=80) for pair in part]
    found = Scan([header for header, _ in done], np.array([digest for _, digest in done], np.uint64))
    if known is not None:
        known.save(found)
    return found


class _Known:
    """The headers of a set of files from an earlier scan, each valid while the file keeps its size and time.

    Args:
        source: The files.
        table: Arrays of the earlier scan by name; None: there was none.
    """

    def __init__(self, source: Files, table: dict[str, np.ndarray] | None) -> None:
        self.source, self.table, self.read = source, table, 0
        self.sizes, self.times = (np.full(len(source), -1, np.int64) for _ in range(2))
        self.modes: list[str] = [] if table is None else [str(mode) for mode in table["modes"]]

    @classmethod
    def load(cls, source: Files) -> "_Known":
        """Return the earlier scan; an empty one if the cache is damaged or of other files."""
        try:
            with _cache_file(source).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                table = {name: file[name] for name in ("size", "time", "mode", "width", "height", "digest", "modes")}
        except Exception:  # missing, truncated, or of another version
            return cls(source, None)
        whole = all(len(table[name]) == len(source) for name in table if name != "modes")
        return cls(source, table if whole else None)

    def get(self, index: int) -> tuple[Header, int] | None:
        """Return header and digest of a file that has not changed."""
        status = os.stat(self.source.encoded(index))
        self.sizes[index], self.times[index] = status.st_size, status.st_mtime_ns
        t = self.table
        if t is None or t["mode"][index] < 0:
            return None
        if t["size"][index] != status.st_size or t["time"][index] != status.st_mtime_ns:
            return None
        size = int(t["width"][index]), int(t["height"][index])
        return (self.modes[t["mode"][index]], size), int(t["digest"][index])

    def save(self, found: Scan) -> None:
        """Keep a scan for the next time; if the cache cannot be written, nothing is kept."""
        modes = sorted({header[0] for header in found.headers if not isinstance(header, str)})
        table: dict[str, Any] = {
            "size": self.sizes,
            "time": self.times,
            "mode": np.array([modes.index(h[0]) if not isinstance(h, str) else -1 for h in found.headers], np.int16),
            "width": np.array([h[1][0] if not isinstance(h, str) else 0 for h in found.headers], np.int32),
            "height": np.array([h[1][1] if not isinstance(h, str) else 0 for h in found.headers], np.int32),
            "digest": found.digests,
        }
        if self.table is not None and all(np.array_equal(table[name], self.table[name]) for name in table):
            return
        try:
            with atomic_file(_cache_file(self.source)) as file:
                np.savez(file, modes=np.array(modes), **table)
        except OSError:
            pass


def _cache_file(source: Files) -> Path:
    names = hashlib.sha256(os.fsencode(os.path.abspath(source.root)) + source.paths.tobytes()).hexdigest()[:24]
    return cache_folder("headers") / f"{names}.npz"


def copies(sources: Sequence[Source], digests: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return for each source a number per image that equal images share, int64 (N,); -1 if unreadable.

    Args:
        sources: The images.
        digests: See `Scan`; longer files with equal digests are read whole here.
    """
    joined = np.concatenate(list(digests)) if digests else np.empty(0, np.uint64)
    owner = np.repeat(np.arange(len(sources)), [len(part) for part in digests])
    start = np.cumsum([0, *(len(part) for part in digests)])
    joined = joined.copy()
    _, inverse, counts = np.unique(joined, return_inverse=True, return_counts=True)
    for place in np.flatnonzero((counts[inverse] > 1) & (joined != 0)):
        source = sources[owner[place]]
        try:
            joined[place] = source.digest(int(place - start[owner[place]]), whole=True)
        except OSError:  # deleted meanwhile; reading it will report that
            joined[place] = 0
    _, first, inverse = np.unique(joined, return_index=True, return_inverse=True)
    numbers = first[inverse]  # the first of its copies: single images keep their order
    numbers[joined == 0] = -1
    return np.split(numbers, start[1:-1])
