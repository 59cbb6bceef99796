"""`convmixer` commands in processes forked from one that has imported everything, which takes a new one seconds."""

import atexit
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any

PRELOADED = [f"convmixer.{name}" for name in ("train.run", "train.plan", "studies.run", "tuning.run")]
PRELOADED += ["convmixer.studies.queue", "optuna", "sklearn.datasets", "pytest"]


class Command:
    """A running command, with the part of `subprocess.Popen` that the tests use.

    Attributes:
        pid: The number of the process. It leads its own process group.
        stdout: What it prints, errors too.
    """

    def __init__(self, *arguments: str, in_one_process: bool = False, **environment: str) -> None:
        """Start a command.

        Args:
            *arguments: As of `convmixer`.
            in_one_process: Whether it measures what models cost in this process too, see `probed_here`.
            **environment: Variables besides those of this process.
        """
        read, write = os.pipe()
        self.stdout = os.fdopen(read, encoding="utf-8", errors="replace")
        method = multiprocessing.get_start_method()
        given = (arguments, os.environ | environment, in_one_process, method, DupFd(write))
        self._process = context().Process(target=_run, args=given)
        self._process.start()
        os.close(write)
        assert self._process.pid
        self.pid = self._process.pid
        atexit.register(self._end)  # before multiprocessing would wait for what a failed test left

    def _end(self) -> None:
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal, or None while the process runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status once the process has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("convmixer", timeout or 0)
        return self.returncode

    def finish(self, timeout: float = 300) -> str:
        """Return what the command printed to its good end."""
        said = self.communicate(timeout)[0]
        assert self.returncode == 0, said
        return said

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        """Return what the process printed until it and its own processes ended; kill them after that many seconds."""
        late = threading.Timer(timeout, os.killpg, (self.pid, signal.SIGKILL))
        late.start()
        with self.stdout:
            said = self.stdout.read()
        late.cancel()
        self.wait(timeout)
        return said, None


def fresh(function: Callable[..., Any], request: dict[str, Any], **_: str) -> Any:
    """Call a function as `convmixer.probe.fresh` does, JSON to JSON, in a forked process."""
    answer, ask = context().Pipe(duplex=False)
    process = context().Process(target=_answer, args=(function, request, ask))
    process.start()
    ask.close()
    try:
        return answer.recv()
    finally:
        process.join()


def _answer(function: Callable[..., Any], request: dict[str, Any], answer: Connection) -> None:
    import probed_here

    answer.send(probed_here.fresh(function, request))


@functools.cache
def context() -> Any:
    """Return a `multiprocessing` context whose processes are forked from one that has imported everything."""
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(PRELOADED)
    return forking


def _run(
    arguments: Sequence[str], environment: dict[str, str], in_one_process: bool, method: str, output: DupFd
) -> None:
    """Do in the new process what `python -m convmixer` does once it has imported everything."""
    import pytest

    import probed_here
    from convmixer import cli

    # the command then starts its own processes in the same way as this test run
    multiprocessing.set_start_method(method, force=True)
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    _print_to(output.detach())
    if threads := environment.get("OMP_NUM_THREADS"):  # was read before
        import torch

        torch.set_num_threads(int(threads))
    if in_one_process:
        probed_here.patch(pytest.MonkeyPatch())
    cli.IMPORTED = time.time()
    sys.argv = ["convmixer", *arguments]
    try:
        sys.exit(cli.main())
    finally:
        atexit._run_exitfuncs()  # not run at the end of forked processes


def _print_to(file: int) -> None:
    """Send output and errors to a file, line by line."""
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, encoding="utf-8", closefd=False) for number in (1, 2))
