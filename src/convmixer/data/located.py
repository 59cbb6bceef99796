"""Finds the images that a text column names by paths, file names or ids, with or without folder and extension.

The folder is found by looking for the files on the disk. If two folders have them, an error asks for --image-root.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from convmixer.data.found import file_size
from convmixer.data.labels import split_of
from convmixer.data.walk import Walk, is_image, walk
from convmixer.errors import RequestError, shown

PROBED = 50  # how many values of a column are looked up to find its images


@dataclass(frozen=True)
class Location:
    """How the texts of a column become paths.

    Args:
        base: The folder that paths are relative to.
        folder: A folder below `base` that is put in front of each text, or "".
        dropped: Number of folders at the start of a text that are left out, e.g. those of another machine.
        stems: Path without extension -> path, if the texts have no extension.
    """

    base: Path
    folder: str = ""
    dropped: int = 0
    stems: dict[str, str] | None = field(default=None, repr=False)

    def path(self, text: str) -> str:
        """Return the path relative to `base` that a text names, whether or not a file is there."""
        if not self.folder and not self.dropped and self.stems is None and "\\" not in text:
            return text
        parts = _parts(text)[self.dropped :]
        path = "/".join([self.folder, *parts] if self.folder else parts)
        return path if self.stems is None else self.stems.get(path, path)

    def note(self, text: str) -> str | None:
        """Return how the texts are read, with an example, unless each text is already the path."""
        path = self.path(text)
        return None if path == text else f"{shown(text)!r} and the like are read as {path}"


class Locator:
    """Looks for the images that texts name, below one folder.

    Args:
        base: The folder.
        table: Name of the table. If it names a split (train.csv), a folder of that split is preferred.
    """

    def __init__(self, base: Path, table: str) -> None:
        self.base, self.split = base, split_of(Path(table).stem)[0]
        self._walk: Walk | None = None
        self._by_name: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}

    def locate(self, texts: Sequence[str]) -> Location | None:
        """Return the location of the images, or None if the texts name none.

        Raises:
            RequestError: Several folders hold images of these names.
        """
        sample = [texts[i] for i in range(0, len(texts), max(1, len(texts) // PROBED)) if texts[i]]
        plain = Location(self.base)
        if any(file_size(self.base / plain.path(text)) >= 0 for text in sample):
            return plain
        votes: Counter[tuple[str, int, bool]] = Counter()
        for text in sample:
            votes.update(self._ways(text))
        most = max(votes.values(), default=0)
        if 2 * most < len(sample) or not sample:
            return None
        folder, dropped, by_stem = self._one([way for way, count in votes.items() if count == most], sample[0])
        return Location(self.base, folder, dropped, self._stems(folder) if by_stem else None)

    def _ways(self, text: str) -> set[tuple[str, int, bool]]:
        """Return each folder, number of parts left out, and whether the extension is missing, that lead to a file."""
        if self._walk is None:
            self._index()
        parts = _parts(text)
        name = parts[-1] if parts else ""
        found = self._by_name.get(name) or self._by_stem.get(name, [])
        by_stem = name not in self._by_name
        ways = set()
        for path in found:
            *folders, file = path.split("/")
            own = [*folders, file.rpartition(".")[0] if by_stem else file]
            same = _equal_at_the_end(own, parts)
            ways.add(("/".join(own[: len(own) - same]), len(parts) - same, by_stem))
        return ways

    def _one(self, ways: Sequence[tuple[str, int, bool]], text: str) -> tuple[str, int, bool]:
        if len(ways) > 1 and self.split:
            ways = [way for way in ways if split_of(way[0].rpartition("/")[2])[0] == self.split] or ways
        if len(ways) > 1:
            folders = ", ".join(sorted(str(self.base / way[0]) for way in ways)[:5])
            raise RequestError(
                f"images called {shown(text)!r} are in several folders: choose --image-root from {folders}"
            )
        return ways[0]

    def _index(self) -> None:
        self._walk = walk(self.base)
        for path in self._walk.files:
            if is_image(path):
                name = path.rpartition("/")[2]
                self._by_name.setdefault(name, []).append(path)
                self._by_stem.setdefault(name.rpartition(".")[0], []).append(path)

    def _stems(self, folder: str) -> dict[str, str]:
        stems: dict[str, str] = {}
        for paths in self._by_stem.values():
            for path in paths:
                if not folder or path.startswith(folder + "/"):
                    stem = path.rpartition(".")[0]
                    if stem in stems:
                        raise RequestError(f"{stem!r} names two images, {stems[stem]} and {path}: give extensions")
                    stems[stem] = path
        return stems


def _equal_at_the_end(one: Sequence[str], other: Sequence[str]) -> int:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _parts(text: str) -> list[str]:
    """Return the parts of a path from any operating system, without drive and "."."""
    path = text.replace("\\", "/")
    if len(path) > 1 and path[1] == ":":
        path = path[2:]
    return [part for part in path.split("/") if part not in ("", ".")]
