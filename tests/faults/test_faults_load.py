"""64 clients for a minute, and bad ones of every kind: the good ones are served, and memory is freed again."""

import contextlib
import itertools
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from bombs import gif_comment, jpeg_with_exif, overlapping_tags, repeated_scan, text_pixels
from serving import PNG, Server, head, multipart, picture, start_process

SECONDS = 60.0
CLIENTS = 64


def send_slowly(server: Server, stop: threading.Event) -> None:
    """Announce 16 MiB, and send a byte a second."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head(16 << 20))
        while not stop.wait(1):
            connection.sendall(b"1")


def do_not_read(server: Server, stop: threading.Event) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500)
        stop.wait(15)


def say_nothing(server: Server, stop: threading.Event) -> None:
    with socket.create_connection(("127.0.0.1", server.port)):
        stop.wait(5)


def send_endless_head(server: Server, stop: threading.Event) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        for n in itertools.count():
            connection.sendall(b"X-%d: a\r\n" % n)
            if stop.wait(0.001):
                return


def posting(body: bytes, kind: str = "image/png") -> Callable[[Server, threading.Event], None]:
    """Return a client that sends a body."""

    def post(server: Server, stop: threading.Event) -> None:
        server.post(body, {"content-type": kind})
        stop.wait(0.5)

    return post


def bad_clients() -> list[Callable[[Server, threading.Event], None]]:
    """Return one client of every kind, each doing its worst once."""
    false = b'--b\r\nContent-Disposition: form-data; filename="a"\r\n\r\n' + b"\r\n--" * 4_000_000
    bombs = [
        repeated_scan(),
        jpeg_with_exif(overlapping_tags()),
        overlapping_tags(),
        gif_comment(),
        text_pixels(1200),
    ]
    return [
        send_slowly, do_not_read, say_nothing, send_endless_head, posting(false, "multipart/form-data; boundary=b"),
        posting(*(part if isinstance(part, bytes) else part["content-type"] for part in multipart(10_000))),
        posting(b"not an image"), posting(bytes(17 << 20)), *map(posting, bombs),
    ]  # fmt: skip


@contextlib.contextmanager
def beside(server: Server, stop: threading.Event) -> Iterator[None]:
    """Run one bad client of every kind again and again."""

    def run(client: Callable[[Server, threading.Event], None]) -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError, httpx.TransportError):
                client(server, stop)

    threads = [threading.Thread(target=run, args=(client,)) for client in bad_clients()]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)


def memory_megabytes(pid: int) -> float:
    """Return the resident memory of a process; those that decode for it come and go."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
def test_good_clients_are_served_beside_bad_ones(serve_weights: Path) -> None:
    process, server = start_process(serve_weights)
    bodies = [picture(seed, kind) for seed, kind in enumerate(("PNG", "JPEG", "WEBP", "GIF"))]
    answers: Counter[int] = Counter()
    times: list[float] = []

    def good(number: int, until: float) -> None:
        with httpx.Client(timeout=60) as client:
            for body in itertools.cycle(bodies[number % 4 :] + bodies[: number % 4]):
                if time.monotonic() > until:
                    return
                start = time.monotonic()
                answer = client.post(f"{server.address}/v1/predict", content=body, headers=PNG)
                times.append(time.monotonic() - start)
                answers[answer.status_code] += 1
                if answer.status_code != 200:
                    time.sleep(float(answer.headers["retry-after"]))

    def crowd(seconds: float) -> None:
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=good, args=(number, until)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    try:
        with beside(server, threading.Event()):  # once before, since pools and decoding processes stay
            crowd(SECONDS)
        time.sleep(12)
        before = memory_megabytes(server.pid)
        answers.clear()
        times.clear()
        with beside(server, threading.Event()):
            crowd(SECONDS)
        time.sleep(12)
        after = memory_megabytes(server.pid)
    finally:
        process.terminate()
        process.communicate(timeout=60)
    p50, p99 = np.percentile(times, [50, 99])
    print(f"{len(times)} answers {dict(answers)}, p50 {p50:.3f} s, p99 {p99:.3f} s, {before:.0f} -> {after:.0f} MB")
    assert answers[200] > 0.5 * answers.total()
    assert set(answers) <= {200, 429, 503}
    assert after < 1.1 * before
    assert process.returncode == 0
