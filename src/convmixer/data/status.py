"""Reads the size and time of many files with one `stat` each, several at once because a network file system is slow.

A file whose size and time are as before counts as unchanged.
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
# ns; some file systems store times in steps of 2 s, so a file that changes twice in that time may keep its time
SETTLED = 2 * 10**9


def file_status(root: Path, names: Sequence[str]) -> np.ndarray:
    """Return size in bytes and time in nanoseconds of files, int64 (N, 2); size -1: missing, or not an ordinary file.

    The time is the later of modification time (mtime) and status-change time (ctime): a file that is moved to the
    place of another one keeps its old mtime.

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
    """Return which times are old enough that any later change of the file gives another time, bool (N,)."""
    return np.asarray(times < time.time_ns() - SETTLED)


def _status(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # gone; a name too long, or one with a zero byte
        return -1, 0
    return found.st_size if stat.S_ISREG(found.st_mode) else -1, max(found.st_mtime_ns, found.st_ctime_ns)
