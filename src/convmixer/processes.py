"""Identifies processes and finds out whether they still run, for locks and queues that several machines share.

Also how a program of ours ends. Standard library only.
"""

import atexit
import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

_NEEDED = ("PATH", "HOME", "USER", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "VIRTUAL_ENV")
# the locale, the linker, Python, threads of the runtimes, and where kernels are kept
_NEEDED_FOR = ("LC_", "LD_LIBRARY", "DYLD_", "PYTHON", "XDG_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ORT_",
               "CONVMIXER_KERNELS", "CUDA_VISIBLE", "COVERAGE_")  # fmt: skip


def sign() -> dict[str, Any]:
    """Return the signature of this process as plain JSON: host, boot, PID namespace, pid, start time."""
    return _machine() | {"pid": os.getpid(), "started": _started(os.getpid())}


def is_here(holder: Mapping[str, Any]) -> bool:
    """Return whether the process with a signature is or was on the same machine, boot and container as this one."""
    return all(holder.get(key) == value for key, value in _machine().items())


def is_alive(holder: Mapping[str, Any]) -> bool:
    """Return whether the process with a signature still runs here; a new process with the same pid does not count."""
    pid = holder.get("pid")
    return isinstance(pid, int) and pid > 0 and process_exists(pid) and holder.get("started") == _started(pid)


def is_dead(holder: Any) -> bool:
    """Return whether the process with a signature ran on this machine and has ended; False if that is not known."""
    return isinstance(holder, Mapping) and is_here(holder) and not is_alive(holder)


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Run the block in one process of this machine at a time; the others wait.

    Args:
        path: A folder, or a lock file, which is made if it is missing.
    """
    import fcntl  # imported only if a lock is taken: not every system has it

    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def own_start(otherwise: float) -> float:
    """Return when this process began, in seconds since 1970, or `otherwise` if the system does not report it."""
    with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):
        up, began = time.clock_gettime(time.CLOCK_BOOTTIME), _started(os.getpid())
        return min(otherwise, time.time() - up + int(began) / os.sysconf("SC_CLK_TCK"))  # type: ignore[arg-type]
    return otherwise


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's main function, and end the process soon after it.

    After a training, Python takes seconds to free its objects one by one, and longer on a busy machine. Here the
    system frees them at once. Before that, threads end and functions registered with `atexit` run, as always. Call
    this before the heavy imports: functions that were registered earlier do not run.

    Args:
        main: Returns the exit status; None is 0.
    """
    status = 1  # if main raises an error
    atexit.register(lambda: os._exit(max(status, _flushed())))  # the first to be registered, so the last to run
    try:
        sys.exit(main())
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


def _flushed() -> int:
    """Write what is still buffered for stdout and stderr, and return the exit status, 1 if that is not possible."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream and not stream.closed:
                stream.flush()
    except BrokenPipeError:  # the reader has seen enough
        return 0
    except OSError as error:
        os.write(2, f"the output could not be written: {error.strerror}\n".encode())
        return 1
    return 0


def child_environment(**others: str) -> dict[str, str]:
    """Return the environment for a process that reads an untrusted file: only variables that it needs, no tokens.

    Args:
        **others: Variables to add.
    """
    kept = {name: value for name, value in os.environ.items() if name in _NEEDED or name.startswith(_NEEDED_FOR)}
    return kept | others


def process_exists(number: int) -> bool:
    """Return whether a process with this pid runs on this machine, whoever owns it."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _machine() -> dict[str, Any]:
    """Return the identity of this machine or container; pids are unique only within it."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"host": socket.gethostname(), "boot": boot, "pids": os.readlink("/proc/self/ns/pid")}
    return {"host": socket.gethostname()}


def _started(pid: int) -> str | None:
    """Return when a process started, in the system's units, or None if the system does not report it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]  # a zombie is dead
