"""Clients that are slow, greedy or send much do not keep others from being served; over real sockets."""

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from convmixer.inference import Classifier
from convmixer.serve import service
from convmixer.serve.limits import Limits
from serving import PNG, Running, Server, head, multipart, picture, raw


@pytest.mark.parametrize(
    "start",
    [b"", b"POST /v1/pre", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: 1", head(1000) + b"part"],
    ids=["silent", "half a line", "half a head", "half a body"],
)  # fmt: skip
def test_slow_clients_are_hung_up_on(serve_classifier: Classifier, start: bytes) -> None:
    with Running(serve_classifier, Limits(send_seconds=0.3)) as server:
        answer = raw(server.port, start)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"too_slow"' in answer
        assert server.post(picture()).status_code == 200


def test_bodies_held_are_bounded(serve_classifier: Classifier) -> None:
    limits = Limits(body_bytes=1000, held_bytes=1500, send_seconds=5)
    with Running(serve_classifier, limits) as server, started(server, 1, head(1000) + b"1" * 900):
        assert b'"busy"' in other_client(server, head(900) + b"2" * 900)
        assert b'"bad_image"' in other_client(server, head(500) + b"2" * 500)  # there is room for this one


def test_pixels_decoded_at_once_are_bounded(serve_classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, lock = service.load_image, threading.Lock()
    pixels, most = 0, [0]

    def load(*args: Any, **options: Any) -> Image.Image:
        nonlocal pixels
        image = decode(*args, **options)
        with lock:
            pixels += image.width * image.height
            most.append(pixels)
        time.sleep(0.05)
        with lock:
            pixels -= image.width * image.height
        return image

    monkeypatch.setattr(service, "load_image", load)
    monkeypatch.setattr(service, "DECODING_PIXELS", 1000)
    monkeypatch.setattr(service.os, "cpu_count", lambda: 8)
    with Running(serve_classifier, Limits()) as server:
        images = (picture(), picture(size=(40, 40)), *[picture(size=(10, 50))] * 4)  # 480, 1600, 500 pixels
        body = b"".join(multipart(1, image)[0].removesuffix(b"--b--\r\n") for image in images) + b"--b--\r\n"
        answer = server.post(body, multipart(1)[1])
        assert len(answer.json()["predictions"]) == 6
    assert max(most) == 1600  # the large one alone
    assert 1000 in most or 980 in most


def test_announced_bytes_cost_nothing(serve_classifier: Classifier) -> None:
    """32 clients that announced 16 MiB and sent one byte used to take all the room there is."""
    with Running(serve_classifier, Limits(send_seconds=5)) as server, contextlib.ExitStack() as open_ones:
        for _ in range(40):
            slow = open_ones.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            slow.sendall(head(16 << 20) + b"1")
        time.sleep(0.5)
        assert server.post(picture()).status_code == 200


def other_client(server: Server, data: bytes) -> bytes:
    """Send a request from another address of this machine."""
    with socket.create_connection(("127.0.0.1", server.port), 10, ("127.0.0.2", 0)) as connection:
        connection.sendall(data)
        return connection.recv(65536)


@contextlib.contextmanager
def started(server: Server, count: int, data: bytes) -> Iterator[None]:
    """Keep connections open on which something was sent."""
    with contextlib.ExitStack() as held:
        for _ in range(count):
            held.enter_context(socket.create_connection(("127.0.0.1", server.port))).sendall(data)
        time.sleep(0.5)
        yield


def test_one_client_leaves_room_for_others(serve_classifier: Classifier) -> None:
    good = head(len(picture())) + picture()
    limits = Limits(queue=8, images=2, send_seconds=5)
    with Running(serve_classifier, limits) as server, started(server, 4, head(100) + b"1"):
        mine = server.post(picture())
        assert (mine.status_code, mine.json()["error"]["code"]) == (429, "too_many_requests")
        assert int(mine.headers["retry-after"]) > 0
        assert other_client(server, good).startswith(b"HTTP/1.1 200")
    with Running(serve_classifier, Limits(body_bytes=1000, held_bytes=2400, send_seconds=5)) as server:
        with started(server, 1, head(1000) + b"1" * 900):
            assert server.post(b"2" * 900).status_code == 429
            assert other_client(server, head(900) + b"2" * 900).startswith(b"HTTP/1.1 422")
        assert server.post(b"2" * 900).status_code == 422  # the others hung up: there is room again


def test_connections_are_bounded_in_all_and_for_each_client(serve_classifier: Classifier) -> None:
    with Running(serve_classifier, Limits(connections=20, send_seconds=5)) as server, started(server, 10, b""):
        assert b'"busy"' in raw(server.port, b"")
        assert other_client(server, head(len(picture())) + picture()).startswith(b"HTTP/1.1 200")


WORDY = {
    "a long line": b"GET /" + b"a" * 200_000,
    "a long header": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000,
    "many headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 50_000,
    "trailers": b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n" + b"X: a\r\n" * 50_000,
    "tiny chunks": b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 50_000,
    "chunk extensions": b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 200_000,
}  # fmt: skip


@pytest.mark.parametrize("name", WORDY)
def test_wordy_requests_are_cut_off(serve_classifier: Classifier, name: str) -> None:
    with Running(serve_classifier, Limits(send_seconds=5)) as server:
        start, answer = time.monotonic(), b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(WORDY[name])
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(65536):
                    answer += part
        assert answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400")) or not answer
        assert time.monotonic() - start < 3
        assert server.post(picture()).status_code == 200


def test_large_chunks_are_taken(serve_classifier: Classifier) -> None:
    with Running(serve_classifier) as server:
        body = picture() + bytes(300_000)  # what follows a PNG's end is not looked at
        pieces = [body[i : i + 1000] for i in range(0, len(body), 1000)]
        answer = httpx.post(f"{server.address}/v1/predict", content=iter(pieces), headers=PNG)
        assert answer.status_code == 200


def test_clients_that_do_not_read_their_answers_are_given_up(serve_classifier: Classifier) -> None:
    with Running(serve_classifier, Limits(send_seconds=0.5)) as server:
        with contextlib.closing(socket.socket()) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(5)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
            time.sleep(2.5)
            received = 0
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(1 << 20):
                    received += len(part)
        whole = len(httpx.get(f"{server.address}/page.js").content)
        assert received < 900 * whole


def test_pipelined_requests_and_upgrades_are_answered_in_order(serve_classifier: Classifier) -> None:
    ask = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n%s\r\n"
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a\r\nSec-WebSocket-Version: 13\r\n"
    with Running(serve_classifier, Limits(send_seconds=0.5)) as server:
        answer = raw(server.port, ask % (b"healthz", b"") + ask % (b"nope", b"") + ask % (b"readyz", b""))
        assert re.findall(rb"HTTP/1.1 (\d+)", answer)[:3] == [b"200", b"404", b"200"]
        answer = raw(server.port, ask % (b"healthz", upgrade))
        assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 4"))
