"""Decodes images in a process that can be killed. The process starts when it is first needed, and serves further
images.

The parent sends one line of JSON, followed by the file's bytes if it has no path; the child answers with one line of
JSON and the pixels. The operating system limits the CPU time and the memory of the child; the parent ends it after
`WALL_SECONDS`.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from convmixer.decode import pixels
from convmixer.decode.errors import ImageError
from convmixer.processes import child_environment

WALL_SECONDS = 60.0  # long, because the machine may be busy; pixels.SECONDS limits the CPU time
MEMORY_BYTES = 3 << 30  # memory beyond that of the idle child; the largest allowed image takes half of it
_ROOT = str(Path(__file__).parents[2])
_START = "from convmixer.decode.worker import main; main()"


def image_apart(source: Path | bytes, in_chans: int, bits: int = 16) -> Image.Image:
    """Return the result of `pixels.decode`, run in another process.

    Raises:
        ImageError: The image cannot be read, or takes too much time or memory.
    """
    answer, data = _ask(source, {"in_chans": in_chans, "bits": bits})
    return Image.frombytes(answer["mode"], tuple(answer["size"]), data)


def header_apart(source: Path | bytes) -> pixels.Header:
    """Return the result of `pixels.header`, run in another process.

    Raises:
        ImageError: See `image_apart`.
    """
    answer, _ = _ask(source, {})
    return answer["mode"], tuple(answer["size"])


def peak_apart(source: Path | bytes) -> int:
    """Return the result of `pixels.peak`, run in another process.

    Raises:
        ImageError: See `image_apart`.
    """
    answer, _ = _ask(source, {"peak": True})
    return int(answer["peak"])


class Worker:
    """A child process that decodes one image after another."""

    def __init__(self) -> None:
        paths = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child_environment(PYTHONPATH=os.pathsep.join(paths), OPENBLAS_NUM_THREADS="1"),
        )

    def ask(self, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """Send a request, and return the answer and the pixels.

        Raises:
            OSError: The process died or was killed.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        timer = threading.Timer(WALL_SECONDS, self.process.kill)
        timer.daemon = True
        timer.start()
        try:
            stdin.write(json.dumps(request).encode() + b"\n" + data)
            stdin.flush()
            answer = json.loads(stdout.readline() or b"null")
            found = stdout.read(answer.get("bytes", 0)) if answer else b""
        finally:
            timer.cancel()
        if not answer or len(found) < answer.get("bytes", 0):
            raise BrokenPipeError
        return answer, found

    def close(self) -> int:
        """End the process and return its status."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        return self.process.wait()


_idle: list[Worker] = []
_busy: list[Worker] = []
_forked: list[list[Worker]] = []  # after a fork: the parent's workers; this process must neither use nor end them


def _after_fork() -> None:
    global _idle, _busy
    _forked.extend((_idle, _busy))
    _idle, _busy = [], []


def _ask(source: Path | bytes, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    data = source if isinstance(source, bytes) else b""
    request["seconds"] = pixels.SECONDS
    request |= {"size": len(data)} if isinstance(source, bytes) else {"path": str(source.absolute())}
    worker = _take()
    _busy.append(worker)
    try:
        answer, found = worker.ask(request, data)
    except OSError:
        raise ImageError(_why_ended(worker.close())) from None
    finally:
        _busy.remove(worker)
    if len(_idle) < (os.cpu_count() or 1):
        _idle.append(worker)
    else:
        worker.close()
    if "error" in answer:
        raise ImageError(answer["error"])
    return answer, found


def _take() -> Worker:
    """Return an idle worker that still runs, or a new one; thread-safe."""
    while _idle:
        with contextlib.suppress(IndexError):  # another thread took the last one
            worker = _idle.pop()
            if worker.process.poll() is None:
                return worker
            worker.close()
    return Worker()


def _why_ended(status: int) -> str:
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return pixels.too_slow()
    return "it makes the decoder crash: save it again as plain JPEG or PNG"


def stop_workers() -> None:
    """Kill the decoding processes that this process started; images that are being decoded fail."""
    for worker in list(_busy):
        worker.process.kill()  # the thread that waits for it cleans up
    while _idle:
        _idle.pop().close()


atexit.register(stop_workers)
os.register_at_fork(after_in_child=_after_fork)


def main() -> None:
    """Decode the images requested on standard input, until it ends."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    pixels.formats(True)  # loads the decoders before memory is limited
    limit_memory(MEMORY_BYTES)
    source, out = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    while line := source.readline():
        request = json.loads(line)
        file = Path(request["path"]) if "path" in request else source.read(request["size"])
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime + request["seconds"]) + 1  # the system counts whole seconds
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        answer, data = _answer(file, request)
        out.write(json.dumps(answer | {"bytes": len(data)}).encode() + b"\n" + data)
        out.flush()


def _answer(file: Path | bytes, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    try:
        if "peak" in request:
            return {"peak": pixels.peak(file, confined=True)}, b""
        if "in_chans" not in request:
            mode, size = pixels.header(file, confined=True)
            return {"mode": mode, "size": size}, b""
        image = pixels.decode(file, request["in_chans"], request.get("bits", 16), confined=True)
        return {"mode": image.mode, "size": image.size}, image.tobytes()
    except MemoryError:
        return {"error": f"it takes more than {MEMORY_BYTES >> 30} GiB of memory to decode"}, b""
    except Exception as error:
        return {"error": str(error)}, b""


def limit_memory(more: int) -> None:
    """Limit the address space to its present size plus `more` bytes, if the system supports that."""
    import resource

    with contextlib.suppress(OSError, ValueError):
        now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + more, resource.getrlimit(resource.RLIMIT_AS)[1]))
