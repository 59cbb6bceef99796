"""Finds the files below a folder, in the same way for every command.

Links are followed, each real folder is read once, and hidden files and convmixer's own output are skipped.
It does not import torch, because `predict` uses it without torch.
"""

import errno
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from convmixer.data.unused import Unused
from convmixer.errors import RequestError
from convmixer.preprocess import SUFFIXES
from convmixer.run_folder import is_own_output

MAX_DEPTH = 32  # deeper folders are counted, not read
SYSTEM = {"__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
HIDDEN = "hidden"
OWN_OUTPUT = "written by convmixer"
READ_ALREADY = "a link to a folder that is already read"
LEADS_OUT = "a link to a folder that contains it"
TOO_DEEP = f"more than {MAX_DEPTH} folders deep"
NOT_ORDINARY = "not an ordinary file"


@dataclass(frozen=True)
class Walk:
    """The files and folders below a folder.

    Args:
        root: The folder.
        files: Paths relative to the root, with "/" between the parts. In each folder the files come first, sorted by
            name, then the folders.
        empty: The folders without usable files, relative to the root.
        unused: What was skipped, and why.
    """

    root: Path
    files: list[str]
    empty: list[str]
    unused: Unused


def is_image(name: str) -> bool:
    """Return whether a file's name ends like that of an image."""
    return name[name.rfind(".") :].lower() in SUFFIXES


def walk(root: Path) -> Walk:
    """Return the files below a folder, at most 32 folders deep.

    A broken link counts as a file, so that it is reported as unreadable if its name ends like an image's.

    Raises:
        RequestError: A folder cannot be read.
    """
    walker = _Walker(root)
    walker.read("")
    return Walk(root, walker.files, walker.empty, walker.unused)


class _Walker:
    def __init__(self, root: Path) -> None:
        self.root, self.real_root = str(root), Path(os.path.realpath(root))
        self.files: list[str] = []
        self.empty: list[str] = []
        self.unused = Unused()
        self.seen: set[tuple[int, int]] = set()
        self.links: deque[str] = deque()

    def read(self, folder: str) -> None:
        """Read real folders before links, so that a folder that is reachable both ways is listed by its real path."""
        self._read_real(folder)
        if not self.links:
            return
        while self.links:
            link = self.links.popleft()
            if self.real_root.is_relative_to(os.path.realpath(self._path(link))):
                self.unused.add(LEADS_OUT, link)
            elif self._is_new(link):
                self._read_real(link)
            else:
                self.unused.add(READ_ALREADY, link)
        self.files.sort(key=_order)

    def _read_real(self, top: str) -> None:
        self._is_new(top)
        stack = [top]
        while stack:
            folder = stack.pop()
            if folder.count("/") >= MAX_DEPTH:
                self.unused.add(TOO_DEEP, folder)
                continue
            stack += reversed(self._read_one(folder))

    def _read_one(self, folder: str) -> list[str]:
        """Take the files of one folder and return the real folders in it."""
        below: list[str] = []
        before = len(self.files) + len(self.links)
        for entry in self._entries(folder):
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(".") or entry.name in SYSTEM:
                self.unused.add(HIDDEN, path)
            elif not _is_folder(entry):
                self._take(entry, path)
            elif is_own_output(entry.path):
                self.unused.add(OWN_OUTPUT, path)
            elif entry.is_symlink():
                self.links.append(path)
            elif self._is_new(path):
                below.append(path)
            else:
                self.unused.add(READ_ALREADY, path)
        if folder and not below and len(self.files) + len(self.links) == before:
            self.empty.append(folder)
        return below

    def _take(self, entry: "os.DirEntry[str]", path: str) -> None:
        try:
            ordinary = entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
        except OSError:  # a link that leads to itself
            ordinary = True
        if ordinary:
            self.files.append(path)
        else:
            self.unused.add(NOT_ORDINARY, path)

    def _entries(self, folder: str) -> "list[os.DirEntry[str]]":
        try:
            with os.scandir(self._path(folder)) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                self.unused.add("its path is too long", folder)
                return []
            raise RequestError(f"cannot read {self._path(folder)}: {error.strerror}") from error

    def _is_new(self, folder: str) -> bool:
        try:
            status = os.stat(self._path(folder))
        except OSError:  # `_entries` names it
            return True
        place = (status.st_dev, status.st_ino)
        if place in self.seen:
            return False
        self.seen.add(place)
        return True

    def _path(self, folder: str) -> str:
        return os.path.join(self.root, folder) if folder else self.root


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _order(path: str) -> list[tuple[bool, str]]:
    """Return a sort key that puts the files of a folder before its folders."""
    *folders, name = path.split("/")
    return [*((True, folder) for folder in folders), (False, name)]
