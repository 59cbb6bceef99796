"""Finds the shards that a URL names: a single one, a range {000..009}, a pattern, or a list in a .txt file."""

import itertools
import re
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from convmixer.data.argument import SHARDS
from convmixer.data.fetch import copies_of, fetch, file_system, short
from convmixer.errors import RequestError
from convmixer.files import cache_folder, write_atomic

MOST_SHARDS = 100_000
LIST_BYTES = 16 << 20
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def fetch_shards(url: str, recorded: bool) -> tuple[list[Path], str, list[str]]:
    """Return local copies of the shards that a URL names, their kind (".tar" or ".parquet"), and notes for the user.

    Args:
        url: As in `argument.read_argument`.
        recorded: The URL was read from a file, not typed by the user: only local copies are used, not the network.

    Raises:
        RequestError: The URL names no shards, or they cannot be fetched.
    """
    notes: list[str] = []
    urls = expand(url)
    if urls[0].endswith(".txt"):
        lists, notes = (copies_of(urls), []) if recorded else fetch(urls, LIST_BYTES)
        urls = [shard for base, path in zip(urls, lists, strict=True) for shard in read_list(path, base)]
    elif "*" in url:
        urls = _matched_before(url) if recorded else _matching(url)
    kind = _kind(url, urls)
    paths, more = (copies_of(urls), []) if recorded else fetch(urls)
    return paths, kind, [*notes, *more]


def expand(url: str) -> list[str]:
    """Return the URLs that ranges like {000..009} stand for.

    Raises:
        RequestError: There are too many, or a range ends before it begins.
    """
    pieces = RANGE.split(url)  # text, first, last, text, first, last, text
    choices = [[pieces[0]]]
    for first, last, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        numbers = range(int(first), int(last) + 1)
        if len(numbers) * len(choices[-1]) > MOST_SHARDS:
            raise RequestError(f"{url} names more than {MOST_SHARDS} files")
        choices.append([f"{number:0{len(first)}}{text}" for number in numbers])
    if sum(1 for _ in itertools.islice(itertools.product(*choices), MOST_SHARDS + 1)) > MOST_SHARDS:
        raise RequestError(f"{url} names more than {MOST_SHARDS} files")
    found = ["".join(parts) for parts in itertools.product(*choices)]
    if not found:
        raise RequestError(f"{url}: a range ends before it begins")
    return found


def read_list(path: Path, base: str) -> list[str]:
    """Return the URLs in a list of shards: one per line, a name relative to the list or a URL on its server.

    Args:
        path: The local copy of the list.
        base: The URL of the list.

    Raises:
        RequestError: The file is not such a list, or it names a URL on another server.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise RequestError(f"{base} is not a list of shards: it is not text") from error
    names = [line for line in lines if line and not line.startswith("#")]
    if not 0 < len(names) <= MOST_SHARDS:
        raise RequestError(
            f"{base} is not a list of shards: it names {len(names)} files, expected 1 to {MOST_SHARDS}"
        )
    return [_beside(base, name) for name in names]


def _beside(base: str, name: str) -> str:
    """Return the URL that a line of a list names. Other servers are refused: the user did not choose them."""
    origin = urlsplit(base)
    # urljoin works only with http
    joined = name if "://" in name else urljoin(base.replace(origin.scheme, "http", 1), name)
    found = urlsplit(joined)
    if "://" not in name:
        found = found._replace(scheme=origin.scheme)
    if (found.scheme, found.netloc) != (origin.scheme, origin.netloc):
        raise RequestError(
            f"{base} names {name[:200]!r} on another server, which is not opened: give that URL as DATA"
        )
    return found.geturl()


def _matching(url: str) -> list[str]:
    """Return the files in a store that a pattern names."""
    protocol = url.partition("://")[0]
    if protocol in ("http", "https"):
        raise RequestError(
            f"{url}: a web server does not list its files; write a range {{000..009}}, or give the URL of a .txt list"
        )
    try:
        found = sorted(f"{protocol}://{name}" for name in file_system(url).glob(url))
    except RequestError:
        raise
    except Exception as error:  # of botocore and others
        raise RequestError(f"{url} cannot be listed: {str(error).splitlines()[0][:200]}") from error
    if not 0 < len(found) <= MOST_SHARDS:
        raise RequestError(f"{url} names {len(found)} files, expected 1 to {MOST_SHARDS}")
    write_atomic(_names(url), "\n".join(found).encode())
    return found


def _matched_before(url: str) -> list[str]:
    if not _names(url).exists():
        raise RequestError(f"there are no local copies of {url}: give it as DATA to fetch it again")
    return _names(url).read_text(encoding="utf-8").splitlines()


def _names(url: str) -> Path:
    return cache_folder("shards", short(url), "names")


def _kind(url: str, urls: list[str]) -> str:
    kinds = {Path(urlsplit(shard).path).suffix.lower() for shard in urls}
    if len(kinds) != 1 or not kinds <= set(SHARDS):
        named = ", ".join(sorted(kind or "no suffix" for kind in kinds))
        raise RequestError(f"{url} names files with {named}: expected all .tar or all .parquet, or a .txt list")
    return kinds.pop()
