"""Atomic file writes, and the folder for caches. Standard library only."""

import contextlib
import hashlib
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from convmixer.processes import process_exists

_TEMPORARY = ".tmp"


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that readers find either the old or the new contents, never a part, even after a power loss.

    Args:
        path: The file; missing folders are created.
        content: The whole contents.

    Raises:
        OSError: The disk is full or the folder cannot be written. The error names `path`, which keeps its old
            contents.
    """
    with atomic_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def atomic_file(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` when the block ends, as `write_atomic` does.

    If the block raises, `path` keeps its old contents and the temporary file is deleted.

    Args:
        path: The file; missing folders are created.
        keep: Path to move the old file to; None: it is deleted.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            path.replace(keep)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        # the error should name the target, not the temporary file; a full disk's error names no file
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Return the path of a hidden temporary file next to a file; `remove_leftovers` recognises its name."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{_TEMPORARY}")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of a file to file-system errors in the block, because the error of a full disk has no name."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Write a folder's list of names to disk, so that a file that was renamed keeps its name after a power loss."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # a folder without read permission, or a system that cannot open folders
        return
    try:
        os.fsync(handle)
    except OSError:  # some network file systems cannot sync folders
        pass
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files below a folder whose writers were processes of this machine that no longer run."""
    host = socket.gethostname()
    for path in folder.rglob(f".*{_TEMPORARY}"):
        name, _, number = path.name.removesuffix(_TEMPORARY).rpartition(".")
        if name.endswith(f".{host}") and number.isdecimal() and not process_exists(int(number)):
            path.unlink(missing_ok=True)


def prune(files: Iterable[Path], most_bytes: float, unused_seconds: float = 0.0) -> None:
    """Delete the least recently used of some files beyond a total size.

    Args:
        files: The files of a cache; whoever uses one sets its time to now.
        most_bytes: Largest total size of the files that stay.
        unused_seconds: Files used within this many seconds always stay.
    """
    known = []
    for path in files:
        with contextlib.suppress(OSError):  # another process deleted it
            status = path.stat()
            known.append((status.st_mtime, status.st_size, path))
    total = 0
    for used, size, path in sorted(known, reverse=True):
        total += size
        if total > most_bytes and time.time() - used >= unused_seconds:
            with contextlib.suppress(OSError):
                path.unlink()


def cached_file(folder: str, key: bytes, suffix: str) -> Path:
    """Return the path of the cache file for a key; nothing is created.

    Args:
        folder: Name of a folder in the cache.
        key: Bytes that identify the contents.
        suffix: End of the file's name.
    """
    return cache_folder(folder) / f"{hashlib.sha256(key).hexdigest()[:24]}{suffix}"


def cache_folder(*parts: str) -> Path:
    """Return the folder for files that can be made again: $XDG_CACHE_HOME/convmixer, by default ~/.cache/convmixer.

    Args:
        *parts: Names of folders below the cache folder; nothing is created.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath("convmixer", *parts)
