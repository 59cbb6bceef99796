"""A real HTTP server on the loopback interface that serves files, and misbehaves on request."""

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FileServer(ThreadingHTTPServer):
    """Serves `files`, a path -> its bytes.

    Attributes:
        faults: What goes wrong with the next requests for a path (GET only), one each: a status, "cut", "stall",
            "drip", "away" (the connection is closed without an answer), or a function to call after a cut.
        asked: The requests so far: method, path, and first byte wanted.
        skips: Whether parts of files are served.
        marks: Whether answers have an ETag.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Any]] = {}
        self.asked: list[tuple[str, str, int]] = []
        self.skips = self.marks = True
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """Clients that give up are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        content = self.server.files.get(self.path)
        start = self._start(content)
        self.server.asked.append((self.command, self.path, start))
        faults = self.server.faults.get(self.path, [])
        fault = faults.pop(0) if faults and self.command == "GET" else None
        if fault == "away":
            self.connection.close()
        elif content is None or isinstance(fault, int):
            self.send_error(fault or 404)
        else:
            self._head(content, start)
            if self.command == "GET":
                self._body(content[start:], fault)

    def _start(self, content: bytes | None) -> int:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = content is not None and self.headers.get("If-Range") == _mark(content)
        return int(wanted[1]) if wanted and same and self.server.skips else 0

    def _head(self, content: bytes, start: int) -> None:
        self.send_response(206 if start else 200)
        if self.server.marks:
            self.send_header("ETag", _mark(content))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()

    def _body(self, content: bytes, fault: Any) -> None:
        if fault is None:
            self.wfile.write(content)
        elif fault == "drip":
            for byte in content:
                self.wfile.write(bytes([byte]))
                time.sleep(0.02)
        else:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.closing.wait(20)
            elif callable(fault):
                fault()
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


def _mark(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[str]:
    """Run a server in a thread during the block, and give its address."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def serving() -> Iterator[FileServer]:
    """Run a `FileServer` during the block."""
    server = FileServer()
    with running(server):
        try:
            yield server
        finally:
            server.closing.set()
