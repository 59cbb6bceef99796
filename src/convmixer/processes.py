"""Which process is this, and does it still run? For locks and queues that several machines share.

Standard library only.
"""

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def sign() -> dict[str, Any]:
    """Return what tells this process from every other, as plain JSON: host, boot, PID namespace, number, start."""
    return _machine() | {"pid": os.getpid(), "started": _started(os.getpid())}


def is_here(holder: Mapping[str, Any]) -> bool:
    """Return whether a process that signed ran where this one runs: same machine, boot and container."""
    return all(holder.get(key) == value for key, value in _machine().items())


def is_alive(holder: Mapping[str, Any]) -> bool:
    """Return whether a process that signed here still runs; a later one may have the same number."""
    pid = holder.get("pid")
    return isinstance(pid, int) and pid > 0 and process_exists(pid) and holder.get("started") == _started(pid)


def is_dead(holder: Any) -> bool:
    """Return whether a process that signed ran here and has ended; one elsewhere, or unknown, counts as alive."""
    return isinstance(holder, Mapping) and is_here(holder) and not is_alive(holder)


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process of this machine at a time into the block; the others wait.

    Args:
        path: A folder, or a lock file, which is made if it is missing.
    """
    import fcntl  # only where a lock is taken: not every system has it

    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def process_exists(number: int) -> bool:
    """Return whether a process of this number runs on this machine, whoever owns it."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _machine() -> dict[str, Any]:
    """Return what tells machines apart, and containers, whose process ids are their own."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"host": socket.gethostname(), "boot": boot, "pids": os.readlink("/proc/self/ns/pid")}
    return {"host": socket.gethostname()}


def _started(pid: int) -> str | None:
    """Return when a process started, as the system counts, or None if the system does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]  # a zombie is dead
