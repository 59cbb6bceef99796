"""uvicorn's HTTP protocol, with limits on connections, on a request's head, and on how slowly a client reads."""

import json
import socket
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from convmixer.serve.http import reason

HEAD_BYTES = 65_536  # limit on a request's head, trailers and chunk framing together
PACE_BYTES = 65_536  # bytes of an answer that a client must read within `Protocol.seconds`


class Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """One connection.

    Attributes:
        seconds: Time for a request's head to arrive, and for PACE_BYTES of the answer to be read.
        most: Limit on open connections.
        most_per_client: Limit on open connections of one address.
    """

    seconds = 10.0
    most = 800
    most_per_client = 400

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # without TCP_NODELAY answers would wait 40 ms; asyncio does not set it on the sockets that uvicorn makes
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unsent = self._received = self._body = 0
        self._head_timer = self.loop.call_later(self.seconds, self._head_late)
        self._watch_timer = self.loop.call_later(self.seconds, self._watch)
        mine = sum(
            other.client is not None and other.client[:1] == (self.client or ())[:1] for other in self.connections
        )
        if len(self.connections) > self.most or mine > self.most_per_client:
            self._hang_up("503 Service Unavailable", "busy", "too many connections are open: try again later")

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._received += len(data)
        super().data_received(data)
        if self._has_request():
            self._head_timer.cancel()
        elif self._head_timer.cancelled():
            self._head_timer = self.loop.call_later(self.seconds, self._head_late)
        # everything outside the body (head, trailers, chunk framing) costs time and memory to parse
        if self._received - self._body > HEAD_BYTES + self._body // 8 and not self.transport.is_closing():
            text = f"a head may have at most {HEAD_BYTES} bytes, and chunks must not be tiny"
            self._hang_up("431 Request Header Fields Too Large", "head_too_large", text)

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._received = self._body = 0
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        self._watch_timer.cancel()
        super().connection_lost(exc)

    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _head_late(self) -> None:
        if not self._has_request() and not self.transport.is_closing():
            text = f"the request did not arrive within {self.seconds:g} s"
            self._hang_up("408 Request Timeout", "too_slow", text)

    def _watch(self) -> None:
        """Disconnect a client that does not read its answer."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and self._unsent and unsent > self._unsent - PACE_BYTES:
            self.transport.abort()
            return
        self._unsent = unsent
        self._watch_timer = self.loop.call_later(self.seconds, self._watch)

    def _hang_up(self, status: str, code: str, message: str) -> None:
        body = json.dumps(reason(code, message))
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        self.transport.write(f"{head}\r\nconnection: close\r\n\r\n{body}".encode())
        self.transport.close()
