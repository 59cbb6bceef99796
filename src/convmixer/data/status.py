"""Size and time of many files, by one `stat` each: several at once, since a network takes a while for each.

What was learned of a file stays valid while both stay the same.
"""

import os
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

AT_ONCE = 8
PART = 1024
# ns; a file changed again so soon after may keep its time, since some file systems count in steps of 2 s
SETTLED = 2 * 10**9


def file_status(root: Path, names: Sequence[str]) -> np.ndarray:
    """Return size and time of files, int64 (N, 2): bytes, -1 if it is not there or not an ordinary file; ns.

    The time is that of the last change of contents or of name, owner and so on, whichever is later: a file put in the
    place of another may bring an old time of contents along.

    Args:
        root: The folder that the names are relative to.
        names: N paths.
    """
    top = os.fspath(root)
    parts = [names[start : start + PART] for start in range(0, len(names), PART)]
    if len(parts) < 2:
        return np.array([_status(os.path.join(top, name)) for name in names], np.int64).reshape(-1, 2)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda part: np.array([_status(os.path.join(top, n)) for n in part], np.int64), parts)
        return np.concatenate(list(found))


def settled(times: np.ndarray) -> np.ndarray:
    """Return which of the times are so old that a change from now on would give another one, bool (N,)."""
    return np.asarray(times < time.time_ns() - SETTLED)


def _status(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # gone; a name too long, or one with a zero byte
        return -1, 0
    return found.st_size if stat.S_ISREG(found.st_mode) else -1, max(found.st_mtime_ns, found.st_ctime_ns)
