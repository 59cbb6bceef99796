"""Runs an exported file in a separate process, which is killed if it takes too long or too much memory.

An untrusted graph can use endless time or memory in more ways than a check can foresee: when it is parsed, when its
constants are folded, or only at one batch size. The limits on the process stop all of them. The process runs
`worker.py`. The two processes exchange one line of JSON and then raw float32 values, never pickled objects.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from convmixer.device import total_bytes
from convmixer.errors import RequestError
from convmixer.processes import child_environment

LOAD_SECONDS = 180.0  # on a busy machine, OpenVINO may compile for this long
RUN_SECONDS, IMAGE_SECONDS = 60.0, 20.0  # a batch of B may take RUN + B * IMAGE, 100 times as long as a model needs
LINE_BYTES = 64 * 2**20  # room for the names of a hundred thousand classes
OUTPUT_VALUES = 2**28  # most output values per batch


class Confined:
    """A process that has loaded an exported file. Threads may share it: batches run one after another.

    Args:
        path: The file or folder.
        threads: Processor threads for the runtime; 0: the runtime's choice.
        memory_bytes: Memory limit of the process; None: half of the machine's memory.
        load_seconds: Time limit of loading.

    Raises:
        RequestError: The file is refused, or loading takes too long or too much memory.
    """

    def __init__(
        self,
        path: Path,
        threads: int = 0,
        memory_bytes: int | None = None,
        load_seconds: float = LOAD_SECONDS,
    ) -> None:
        self.path, self.threads, self.load_seconds = path, threads, load_seconds
        self.memory_bytes = memory_bytes or total_bytes() // 2
        self._lock = threading.Lock()
        self.facts = self._start()

    def run(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the outputs for a batch (B, C, H, W), float32.

        Raises:
            RuntimeError: The runtime fails, or takes too long or too much memory.
        """
        with self._lock:
            if self._process.poll() is not None:  # an earlier batch or another program ended it
                self._start()
            try:
                send(self._input, {}, [batch])
                answer, arrays = self._receive(time.monotonic() + RUN_SECONDS + IMAGE_SECONDS * len(batch))
            except (_Ended, BrokenPipeError) as error:
                raise RuntimeError(self._reason(error)) from None
        if "error" in answer:
            raise RuntimeError(f"{self.path}: {answer['error']}")
        return tuple(arrays)

    def _start(self) -> dict[str, Any]:
        arguments = [str(self.path), str(self.threads), str(self.memory_bytes)]
        # -P and only absolute entries: a module in the current folder must not be imported
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "convmixer.exported.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child_environment(PYTHONPATH=os.pathsep.join(entry for entry in sys.path if os.path.isabs(entry))),
            start_new_session=True,  # Ctrl-C ends this process, which then ends the other
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        weakref.finalize(self, _end, self._process)
        try:
            facts, _ = self._receive(time.monotonic() + self.load_seconds)
        except _Ended as error:
            raise RequestError(self._reason(error)) from None
        if "refused" in facts:
            raise RequestError(facts["refused"])
        return facts

    def _receive(self, deadline: float) -> tuple[dict[str, Any], list[np.ndarray]]:
        try:
            return receive(_Timed(self._output, deadline))
        except (_Ended, ValueError, KeyError, TypeError) as error:
            _end(self._process)
            raise error if isinstance(error, _Ended) else _Ended("it gave an unreadable answer") from None

    def _reason(self, error: Exception) -> str:
        if isinstance(error, _Ended) and error.args:
            return f"{self.path} was stopped: {error}"
        code = self._process.wait()
        size = f"{self.memory_bytes / 2**30:.1f} GiB"
        return f"{self.path} was stopped: its process ended with {code}, likely since it needs more than {size}"


class _Ended(Exception):
    """The process has ended. The argument is the reason if we ended it; otherwise there is no argument."""


class _Timed:
    """Reads from a pipe until a deadline."""

    def __init__(self, pipe: IO[bytes], deadline: float) -> None:
        self.file, self.deadline, self.rest = pipe.fileno(), deadline, bytearray()

    def _some(self, count: int) -> bytes:
        if not select.select([self.file], [], [], max(0.0, self.deadline - time.monotonic()))[0]:
            raise _Ended("it took too long")
        chunk = os.read(self.file, count)
        if not chunk:
            raise _Ended
        return chunk

    def readline(self, most: int) -> bytes:
        chunk = b""
        while b"\n" not in chunk:
            chunk = self._some(65536)
            self.rest += chunk
            if len(self.rest) > most:
                raise ValueError("a line without end")
        line, _, self.rest = self.rest.partition(b"\n")
        return bytes(line)

    def read(self, count: int) -> bytes:
        data, self.rest = self.rest[:count], self.rest[count:]
        while len(data) < count:
            data += self._some(min(2**20, count - len(data)))
        return bytes(data)


def send(pipe: IO[bytes], facts: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    """Write facts and float32 arrays to a pipe."""
    arrays = [np.ascontiguousarray(array, np.float32) for array in arrays]
    pipe.write(json.dumps({**facts, "shapes": [array.shape for array in arrays]}).encode() + b"\n")
    for array in arrays:
        pipe.write(array.data.cast("B") if array.size else b"")
    pipe.flush()


def receive(pipe: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Return the facts and arrays that `send` wrote; `pipe` needs the methods `readline` and `read`.

    Raises:
        ValueError: The data are not in the format that `send` writes, or they are too large.
        EOFError: The pipe was closed.
    """
    line = pipe.readline(LINE_BYTES)
    if not line:
        raise EOFError
    facts = json.loads(line)
    arrays = []
    for shape in facts.pop("shapes"):
        count = int(np.prod([int(length) for length in shape], dtype=object)) if shape else 1
        if not 0 <= count <= OUTPUT_VALUES:
            raise ValueError("too many values")
        arrays.append(np.frombuffer(pipe.read(4 * count), np.float32).reshape(shape))
    return facts, arrays


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with contextlib.suppress(OSError):  # raised if the buffer still holds unwritten data
                pipe.close()
