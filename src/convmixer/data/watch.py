"""Notices that a data set changes while a run trains on it.

Names, sizes and times of the files are compared first. The checksum is computed again only if one of them differs.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from convmixer.data.argument import read_argument
from convmixer.data.find import find
from convmixer.data.options import Options
from convmixer.data.status import file_status
from convmixer.data.walk import walk
from convmixer.errors import RequestError


class Watch:
    """The state of a data set on this machine's disk.

    Args:
        spec: The data argument, see `argument.read_argument`.
        checksum: Checksum of the data when they were read.
        options: The options with which the data were read.
    """

    def __init__(self, spec: str, checksum: str, options: Options) -> None:
        self.spec, self.checksum, self.options = spec, checksum, options
        self.path = read_argument(spec).path
        self._listing = listing(self.path)

    def changed(self) -> str | None:
        """Return what has changed since the last call, in words; None: nothing."""
        found = listing(self.path)
        if found == self._listing:
            return None
        self._listing = found
        try:
            checksum = find(self.spec, options=self.options).checksum
        except RequestError as error:
            return f"its files can no longer be read ({error})"
        if checksum == self.checksum:  # only the times changed
            return None
        self.checksum = checksum
        return "its checksum has changed"


def listing(path: Path | None) -> str | None:
    """Return a hash of the names, sizes and times of the files below a path; None if `path` is None."""
    if path is None:
        return None
    try:
        names = walk(path).files if path.is_dir() else [""]
    except RequestError as error:
        return str(error)
    return status_hash(path, names)


def status_hash(root: Path, names: Sequence[str]) -> str:
    """Return a hash of files' names, sizes and times."""
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape"))
    digest.update(file_status(root, names).tobytes())
    return digest.hexdigest()
