"""Fetches files from HTTP, S3 and Google Cloud Storage into the cache folder, through fsspec.

A file appears there only when it is complete. An interrupted download continues where it stopped. Time and size are
limited. If a server fails or stalls, the download is tried again a limited number of times, after growing pauses. No
more bytes are read than the server announced. A download that does not fit on the disk is not started.
"""

import errno
import hashlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from convmixer.errors import RequestError
from convmixer.files import cache_folder, prune, sync_folder
from convmixer.processes import one_at_a_time
from convmixer.progress import track
from convmixer.text import terminal

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before a second, third, ... try
RENEWED_BY = 1 << 20  # bytes; after a try that fetches this many or more, the shortest pause comes next
CONNECT_SECONDS = 10.0
STALL_SECONDS = 30.0  # a try ends if it fetches fewer than SLOWEST bytes per second over this time
SLOWEST = 10_000
CHUNK = 1 << 20
AT_ONCE = 8  # files
SPARE_BYTES = 1 << 30  # bytes of the disk that are left free
MOST_SHARE = 0.5  # share of the disk for all copies; "the disk" is the space that would be free without them
UNUSED_SECONDS = 7 * 86400.0  # copies that were used in this time are kept, because a run may still read them
LOCAL_PROBLEMS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
PASSING = (408, 425, 429)  # 4xx statuses after which another try may succeed
CLIENTS = ("aiohttp", "botocore", "fsspec", "gcsfs", "google", "s3fs")  # packages after whose errors to try again
PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server, as the server described it.

    Args:
        url: Its URL.
        size: Its size in bytes.
        mark: The server's mark of the version: ETag, else date; "" if the server gives neither.
    """

    url: str
    size: int
    mark: str

    @property
    def place(self) -> Path:
        """The path of its local copy. A changed file gets a new path, because a run may still read the old copy."""
        return _place(self.url, short(f"{self.size} {self.mark}"))


def fetch(urls: Sequence[str], most_bytes: int | None = None) -> tuple[list[Path], list[str]]:
    """Return local copies of files, fetched if they are missing or have changed, and notes for the user.

    Args:
        urls: The URLs of the files.
        most_bytes: Largest allowed size of a file; None: only the disk limits it.

    Raises:
        RequestError: A file cannot be fetched, is too large, or changes while it is fetched.
    """
    stop = threading.Event()
    found, notes = _split_notes(_side_by_side(lambda url: _look(url, stop), urls, stop))
    missing = [file for file in found if isinstance(file, RemoteFile) and not file.place.exists()]
    if missing:
        _forget_old_copies({file.place if isinstance(file, RemoteFile) else file for file in found}, missing)
    _check_sizes(missing, most_bytes)
    if missing and most_bytes is None:
        size = sum(file.size for file in missing) / 1e6
        print(f"fetching {len(missing)} of {len(urls)} files, {size:,.1f} MB, into {cache_folder('shards')}")
    done = _side_by_side(lambda file: _fetch(file, stop) if isinstance(file, RemoteFile) else file, found, stop)
    return done, notes


def copies_of(urls: Iterable[str]) -> list[Path]:
    """Return the most recently fetched or used local copy of each URL, without using the network.

    Raises:
        RequestError: A URL has no local copy.
    """
    found = []
    for url in urls:
        copy = _newest(url)
        if copy is None:
            raise RequestError(
                f"there is no local copy of {url}, and a recorded URL is never opened unasked: give it as DATA"
            )
        found.append(copy)
    return found


def _side_by_side(work: Callable[[Any], T], items: Sequence[Any], stop: threading.Event) -> list[T]:
    """Run work on each item in threads, and return the results in order; the first error stops all threads."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            return list(track(pool.map(work, items), "fetching", len(items), shown_from=2))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _split_notes(looked: Iterable[tuple[Any, str | None]]) -> tuple[list[Any], list[str]]:
    pairs = list(looked)
    return [file for file, _ in pairs], [note for _, note in pairs if note]


def _check_sizes(missing: Sequence[RemoteFile], most: int | None) -> None:
    large = next((file for file in missing if most is not None and file.size > most), None)
    if large is not None:
        raise RequestError(f"{large.url} has {large.size} bytes, more than the limit of {most} for such a file")
    folder = cache_folder("shards")
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(file.size for file in missing), shutil.disk_usage(folder).free
    if missing and needed > free - SPARE_BYTES:
        raise RequestError(
            f"{needed / 1e9:.1f} GB would be fetched into {folder}, where {free / 1e9:.1f} GB are free, and "
            f"{SPARE_BYTES / 1e9:.1f} GB must stay free: free some, or set XDG_CACHE_HOME to a larger disk"
        )


def _forget_old_copies(wanted: Container[Path], missing: Sequence[RemoteFile]) -> None:
    """Delete copies that were not used for a week, the oldest first, if all copies would take over half the disk."""
    folder = cache_folder("shards")
    copies = {path: size for path in folder.rglob("*") if path.is_file() and (size := _size(path))}
    if copies:
        room = MOST_SHARE * (shutil.disk_usage(folder).free + sum(copies.values()))
        others = [path for path in copies if path not in wanted]
        taken = sum(size for path, size in copies.items() if path in wanted) + sum(file.size for file in missing)
        prune(others, room - taken, UNUSED_SECONDS)


# Ask for a file


def _look(url: str, stop: threading.Event) -> tuple[RemoteFile | Path, str | None]:
    """Return the server's description of a file, or if it cannot be reached, the newest copy and a note."""
    try:
        info = _persist(url, lambda: file_system(url).info(url, timeout=CONNECT_SECONDS + STALL_SECONDS), stop)
    except _Unreachable as error:
        copy = _newest(url)
        if copy is None:
            raise RequestError(str(error)) from error
        fetched = time.strftime("%F %R", time.gmtime(copy.stat().st_mtime))
        return copy, f"{error}: the local copy of {fetched} UTC is used"
    if url.startswith("https:") and not str(info.get("url", url)).startswith("https:"):
        raise RequestError(f"{url} redirects to an unencrypted address, {info['url']}, which is not opened")
    size = info.get("size")
    if not isinstance(size, int) or size < 0:
        raise RequestError(f"the server does not say how large {url} is: not fetched")
    mark = _mark(info)
    note = None if mark else f"the server gives neither ETag nor date of {url}: only a change of its size is noticed"
    return RemoteFile(url, size, mark), note


def _mark(facts: Any) -> str:
    """Return the server's mark of the file's version, from fsspec's description or the HTTP headers."""
    for key in ("ETag", "etag", "generation", "LastModified", "Last-Modified", "mtime", "last_modified"):
        if facts.get(key):
            return str(facts[key])
    return ""


def file_system(url: str) -> Any:
    """Return fsspec's file system for a URL.

    Raises:
        RequestError: Its package is not installed.
    """
    import fsspec

    protocol = url.partition("://")[0]
    try:
        if protocol not in ("http", "https"):
            return fsspec.filesystem(protocol)
        return fsspec.filesystem(protocol, client_kwargs={"trust_env": True})  # proxies
    except ImportError as error:
        package = PACKAGES.get(protocol, "aiohttp")
        raise RequestError(f"{protocol}:// needs the package {package}: pip install {package}") from error


# Fetch a file


def _fetch(file: RemoteFile, stop: threading.Event) -> Path:
    """Return the local copy of a file; if several processes of this machine ask for it, only one fetches it."""
    place = file.place
    place.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(place.with_name("lock")):
        if not place.exists():
            part = place.with_name("part")
            if not file.mark:  # the rest could be of another version
                part.unlink(missing_ok=True)
            try:
                _persist(file.url, lambda: _receive(file, part, stop), stop, lambda: _size(part))
            except _Unreachable as error:
                raise RequestError(
                    f"{error}; the bytes that arrived are kept, and the next start continues from there"
                ) from error
            part.replace(place)
            sync_folder(place.parent)
        os.utime(place)  # marks the copy used last
    return place


def _receive(file: RemoteFile, part: Path, stop: threading.Event) -> None:
    """Fetch the rest of a file whose beginning is in `part`.

    Raises:
        Exception: Whatever stopped it.
    """
    with part.open("ab") as copy:
        if _size(part) > file.size:
            copy.truncate(0)
        if _size(part) == file.size:
            return
        stream, start = _open(file, _size(part))
        copy.truncate(start)
        with stream:
            _copy(stream, copy, file.size - start, stop)
        copy.flush()
        os.fsync(copy.fileno())
    if (there := _size(part)) != file.size:
        raise ConnectionError(f"cut off after {there} of {file.size} bytes")


def _open(file: RemoteFile, start: int) -> tuple[Any, int]:
    """Return a stream of a file from a position on, and that position; it is 0 if the server cannot skip."""
    system = file_system(file.url)
    if not file.url.startswith("http"):
        stream = system.open(file.url, "rb", block_size=4 * CHUNK)
        stream.seek(start)
        return stream, start
    import aiohttp

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-", "If-Range": file.mark} if start else {})
    total = CONNECT_SECONDS + STALL_SECONDS + file.size / SLOWEST
    limits = aiohttp.ClientTimeout(total, sock_connect=CONNECT_SECONDS, sock_read=STALL_SECONDS)
    stream = system.open(file.url, "rb", block_size=0, size=file.size, headers=headers, timeout=limits)
    answer = stream.r
    if _mark(answer.headers) != file.mark:
        stream.close()
        raise RequestError(f"{file.url} changed while it was fetched: start again")
    if answer.headers.get("Content-Encoding", "identity") not in ("", "identity"):
        stream.close()
        raise RequestError(
            f"the server compresses {file.url} although it was asked not to: its size cannot be checked"
        )
    skipped = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
    if answer.status != 200 and not skipped:
        stream.close()
        raise ConnectionError(f"unexpected status {answer.status}")
    return stream, start if skipped else 0


def _copy(stream: Any, copy: Any, left: int, stop: threading.Event) -> None:
    """Copy at most `left` bytes from one stream to another, and give up if they arrive too slowly."""
    began, received = time.monotonic(), 0
    while left > 0 and not stop.is_set():
        chunk = stream.read(min(CHUNK, left))
        if not chunk:
            return
        copy.write(chunk)
        left -= len(chunk)
        received += len(chunk)
        seconds = time.monotonic() - began
        if seconds > STALL_SECONDS:
            if received < SLOWEST * seconds:
                raise TimeoutError(f"{received} bytes in {seconds:.0f} s")
            began, received = time.monotonic(), 0


# Try again


class _Unreachable(Exception):
    """All tries failed; the message says how."""


def _persist(url: str, work: Callable[[], T], stop: threading.Event, progress: Callable[[], int] = lambda: 0) -> T:
    """Return the result of `work`; if it fails, try again after growing pauses.

    Raises:
        RequestError: `work` failed in a way that another try would not change.
        _Unreachable: All tries failed.
    """
    tries, before = 0, progress()
    while True:
        try:
            return work()
        except Exception as error:
            if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in CLIENTS:
                raise
            if reason := _final(error, url):
                raise RequestError(f"{url} cannot be read: {reason}") from error
            problem = _in_words(error)
        if progress() - before >= RENEWED_BY:
            tries, before = 0, progress()
        if tries == len(PAUSES) or stop.is_set():
            raise _Unreachable(f"{url} cannot be read after {tries + 1} tries: {problem}")
        print(f"{terminal(url)}: {terminal(problem)}; trying again in {PAUSES[tries]:g} s", file=sys.stderr)
        stop.wait(PAUSES[tries])
        tries += 1


def _final(error: BaseException, url: str) -> str | None:
    """Return why another try would be useless, or None."""
    status = _status(error)
    if status is not None:
        return f"the server answers {status}" if 400 <= status < 500 and status not in PASSING else None
    if isinstance(error, OSError) and error.errno in LOCAL_PROBLEMS:
        return f"{error.strerror} ({error.filename or cache_folder('shards')})"
    if isinstance(error, FileNotFoundError) and (error.__cause__ is None or not url.startswith("http")):
        return "there is no such file"
    if isinstance(error, PermissionError) or "credential" in type(error).__name__.lower():
        return f"access is denied ({_in_words(error)})"
    return None


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status behind an error."""
    while error is not None:
        if isinstance(status := getattr(error, "status", None), int):
            return status
        error = error.__cause__
    return None


def _in_words(error: BaseException) -> str:
    status = _status(error)
    if status is not None:
        return f"the server answers {status}"
    if isinstance(error, FileNotFoundError) and error.__cause__:  # fsspec raises it for a broken connection too
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0][:200] or "no answer in time"


# Places in the cache


def short(text: str) -> str:
    """Return a hash of a text, 16 hexadecimal digits, for the name of a file."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def _place(url: str, version: str) -> Path:
    """Return the path of the local copy of a version.

    The URL's file name and folder name are kept, because either may name the split.
    """
    parts = [re.sub(r"[^\w.-]", "_", part)[-100:] for part in re.split(r"[?#]", url)[0].split("/")[3:]]
    tail = [part for part in parts if part.strip(".")][-2:] or ["file"]
    return cache_folder("shards", short(url), version, *tail)


def _newest(url: str) -> Path | None:
    pattern = _place(url, "*").relative_to(folder := cache_folder("shards"))
    copies = [copy for copy in folder.glob(str(pattern)) if copy.is_file()]
    return max(copies, key=lambda copy: copy.stat().st_mtime_ns, default=None)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
