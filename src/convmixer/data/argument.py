"""Decides what a data argument names: built-in data, a path, a URL, or a data set on the Hugging Face hub.

No data are read here. If a name could mean two things, one is chosen. A note says which one, and how to name the
other.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from convmixer.errors import RequestError

HUB = "hf-hub:"  # "hf-hub:owner/name" is a data set on the hub, even if a path owner/name exists
HUB_NAMES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
BUILT_IN = ("digits", *HUB_NAMES)
TABLES = (".csv", ".tsv")
SHARDS = (".parquet", ".tar")
ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar", ".gz")  # not read
PROTOCOLS = ("http", "https", "s3", "gs")
_SECRET = re.compile(
    r"[?&](x-(amz|goog)-signature|signature|sig|token|access_token|key|api_key|password)=", re.IGNORECASE
)


@dataclass(frozen=True)
class Argument:
    """What a data argument names.

    Args:
        spec: The argument, made unambiguous: a path is absolute, a hub name begins with "hf-hub:".
        path: The file or folder; None for data that must be fetched or come with a package.
        repository: "owner/name" on the hub, or None.
        inside: The folder inside the repository.
        url: URL of the shards on a server, or None.
        notes: If the argument could mean two things: which was chosen, and how to name the other.
    """

    spec: str
    path: Path | None = None
    repository: str | None = None
    inside: str = ""
    notes: tuple[str, ...] = ()
    url: str | None = None


def read_argument(spec: str, recorded: bool = False) -> Argument:
    """Return what a data argument names.

    Args:
        spec: "digits", "cifar10", "cifar100", a path, the URL of shards (see `remote.fetch_shards`), or "owner/name"
            or "owner/name/configuration" on the hub, with "hf-hub:" in front if it could also be a path.
        recorded: The argument was read from weights or a record, not typed by the user. Then a name without "hf-hub:"
            is a path, and is not looked up on the hub.

    Raises:
        RequestError: The argument names no data.
    """
    if spec in BUILT_IN:
        return _built_in(spec)
    if spec.startswith(HUB):
        return _on_hub(spec.removeprefix(HUB), ())
    if "://" in spec:
        return _at_url(spec)
    path = Path(spec).expanduser()
    if _exists(path):
        other = _is_hub_name(spec) and not path.suffix
        note = f"{spec}: the path on this disk is used; for the data set on the hub write {HUB}{spec}"
        return Argument(os.path.abspath(path), path, notes=(note,) if other else ())
    if recorded:
        hub = f" (if it is a data set on the hub: {HUB}{spec})" if _is_hub_name(spec) else ""
        raise RequestError(f"the training data {spec!r} are not here: name the data{hub}")
    if not _is_hub_name(spec) or path.suffix in (*TABLES, *SHARDS):
        raise RequestError(
            f"no data {spec!r}: give digits, cifar10, cifar100, an existing folder, .csv, .tar or .parquet file, "
            "a URL of shards, or a hub name owner/name or owner/name/configuration"
        )
    if Path(spec.split("/")[0]).is_dir():
        raise RequestError(
            f"no data {spec!r}: the folder {spec.split('/')[0]} is here, but it holds nothing of that name "
            f"(for the data set on the hub write {HUB}{spec})"
        )
    note = f"{spec}: no such path here, so the data set of that name on the hub is used; for a path write ./{spec}"
    return _on_hub(spec, (note,))


def places(name: str) -> list[Path]:
    """Return where to look on this disk for built-in data that do not come with a package."""
    roots = [os.environ.get("CONVMIXER_DATA"), "../shared/data", "data"]
    return [Path(root) / name for root in roots if root]


def _built_in(name: str) -> Argument:
    found = next((place for place in places(name) if place.is_dir()), None) if name in HUB_NAMES else None
    notes = [f"{name}: read from {found}"] if found else []
    if _exists(Path(name)):
        notes.append(f"{name}: the built-in data set is used; for the folder of that name write ./{name}")
    return Argument(name, found, HUB_NAMES.get(name), notes=tuple(notes))


def _on_hub(name: str, notes: tuple[str, ...]) -> Argument:
    if not _is_hub_name(name):
        raise RequestError(f"{name!r} is not a data set name on the hub: write {HUB}owner/name")
    owner, repository, *inside = name.split("/")
    return Argument(HUB + name, None, f"{owner}/{repository}", "/".join(inside), notes)


def _at_url(url: str) -> Argument:
    protocol, _, rest = url.partition("://")
    if protocol not in PROTOCOLS:
        raise RequestError(f"{url}: data are read from {', '.join(PROTOCOLS)} or this disk, not from {protocol}")
    if "@" in rest.split("/")[0] or _SECRET.search(url):
        raise RequestError(
            f"this {protocol}:// URL holds a password or a signature, which the run and its weights would store: put "
            "the password into ~/.netrc, or use s3:// or gs:// with their usual credentials"
        )
    return Argument(url, url=url)


def _is_hub_name(spec: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(/\w[\w.-]*)?", spec) is not None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # e.g. a name too long
        return False
