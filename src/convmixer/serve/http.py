"""What an HTTP request may be: its size, its pace, its parts; and how a refusal looks. Knows nothing of images."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

DRAIN_SECONDS = 2.0  # how long a refused body is read on, so that the client gets to read the answer
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Refusal(Exception):
    """A request that is not served.

    Args:
        status: HTTP status.
        code: One word for programs.
        message: What is wrong and what to do.
        headers: Further headers, e.g. Retry-After.
    """

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


def reason(code: str, message: str) -> dict[str, Any]:
    """Return the JSON body of every refusal."""
    return {"error": {"code": code, "message": message}}


async def read_body(request: Request, max_bytes: int, seconds: float) -> bytes:
    """Return the body of a request.

    Raises:
        Refusal: 400 it is empty or its length is not a number, 408 it comes too slowly, 413 it is too large.
    """
    too_large = Refusal(413, "body_too_large", f"the body may have at most {max_bytes} bytes")
    if declared_length(request) > max_bytes:
        await drain(request)
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    break
    except TimeoutError:
        text = f"the body did not arrive within {seconds:g} s"
        raise Refusal(408, "too_slow", text, {"connection": "close"}) from None
    except ClientDisconnect:
        raise Refusal(400, "disconnected", "the client closed the connection") from None
    if len(body) > max_bytes:
        body.clear()
        await drain(request)
        raise too_large
    if not body:
        raise Refusal(400, "empty", "the body is empty: send an image")
    return bytes(body)


def declared_length(request: Request) -> int:
    """Return the Content-Length, 0 where there is none.

    Raises:
        Refusal: 400 it is not a number.
    """
    try:
        return int(request.headers.get("content-length", 0))
    except ValueError:
        raise Refusal(400, "bad_length", "Content-Length is not a number") from None


async def drain(request: Request) -> None:
    """Read and drop what is left of a body for a moment: an early close would hide the answer from the client."""
    with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):
        async with asyncio.timeout(DRAIN_SECONDS):
            async for _ in request.stream():
                pass


def split_parts(body: bytes, content_type: str, max_parts: int) -> list[bytes]:
    """Return the contents of the parts of a multipart body; names and file names are not looked at.

    Raises:
        Refusal: 400 it is not a proper multipart body or has no parts, 413 it has too many.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise Refusal(400, "bad_multipart", "the multipart Content-Type has no boundary")
    parts: list[bytearray] = []

    def begin() -> None:
        if len(parts) == max_parts:
            raise Refusal(413, "too_many_images", f"a request may have at most {max_parts} images")
        parts.append(bytearray())

    def data(chunk: bytes, start: int, end: int) -> None:
        parts[-1] += chunk[start:end]

    finished = False

    def finish() -> None:
        nonlocal finished
        finished = True

    try:
        parser = MultipartParser(boundary, {"on_part_begin": begin, "on_part_data": data, "on_end": finish})
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise Refusal(400, "bad_multipart", "the multipart body is malformed") from None
    if not finished:
        raise Refusal(400, "bad_multipart", "the multipart body is cut short")
    if not parts:
        raise Refusal(400, "empty", "the multipart body has no parts: send at least one image")
    return [bytes(part) for part in parts]


class Guard:
    """ASGI middleware: adds `HEADERS` to every response that does not set them itself, and counts responses.

    Args:
        app: The application.
        count: Called with the route's path ("other" where there is none) and the status.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None]) -> None:
        self.app, self.count = app, count
        self.pairs = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(p for p in self.pairs if p[0] not in present)]
                # the route, not the path: each path asked for would become a new series
                self.count(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            await self.app(scope, receive, with_headers)
        except Exception:  # answered further out, as a 500
            self.count(getattr(scope.get("route"), "path", "other"), 500)
            raise


class Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's HTTP protocol with a limit on how long a request's head may take, which uvicorn leaves open."""

    head_seconds = 10.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # asyncio sets this only on sockets made for TCP by name, which uvicorn's are not: answers would wait 40 ms
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._head_timer = self.loop.call_later(self.head_seconds, self._head_late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._has_request():
            self._head_timer.cancel()
        elif self._head_timer.cancelled():
            self._head_timer = self.loop.call_later(self.head_seconds, self._head_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        super().connection_lost(exc)

    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _head_late(self) -> None:
        if self._has_request() or self.transport.is_closing():
            return
        body = json.dumps(reason("too_slow", f"the request did not arrive within {self.head_seconds:g} s"))
        head = f"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        self.transport.write(f"{head}\r\nconnection: close\r\n\r\n{body}".encode())
        self.transport.close()
