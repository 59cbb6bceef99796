"""Real servers for the tests, in a thread or a process, and requests to send to them."""

import functools
import io
import re
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import uvicorn
from PIL import Image

from convmixer.inference import Classifier
from convmixer.preprocess import Preprocessing
from convmixer.serve.access import Access
from convmixer.serve.app import create_app
from convmixer.serve.limits import Limits
from convmixer.serve.server import protocol

CLASSES = ("apple", "bread", "cheese")
P = Preprocessing(img_size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
PNG = {"content-type": "image/png"}
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # httpx would read all certificates for each request


def picture(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (20, 24)) -> bytes:
    photo = _flower()
    top, left = 10 * seed % 300, 7 * seed % 500
    buffer = io.BytesIO()
    Image.fromarray(photo[top : top + 120, left : left + 120]).resize(size).save(buffer, kind)
    return buffer.getvalue()


@functools.cache
def _flower() -> np.ndarray:
    from sklearn.datasets import load_sample_image

    return load_sample_image("flower.jpg")  # type: ignore[no-any-return]


def write_network(path: Path) -> None:
    """Write a small network as an ONNX file."""
    import torch

    from convmixer.exported.check import Images
    from convmixer.exported.export import export_model
    from convmixer.models.create import create_model

    torch.manual_seed(0)
    model = create_model("convmixer_8_1_p4_k3", num_classes=3).eval()
    images = [Image.open(io.BytesIO(picture(seed))) for seed in range(8)]
    export_model(model, CLASSES, P, Images("photograph", images, None, ()), path, about={"architecture": "tiny"})


@dataclass
class Server:
    address: str
    port: int
    pid: int = 0

    def post(self, body: bytes, headers: dict[str, str] = PNG, query: str = "") -> httpx.Response:
        url = f"{self.address}/v1/predict{query}"
        return httpx.post(url, content=body, headers=headers, timeout=20, verify=NO_TLS)


def wait_until_ready(address: str) -> None:
    for _ in range(200):
        try:
            if httpx.get(f"{address}/readyz", verify=NO_TLS).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("the server did not start")


class Running:
    """A server in a thread of this process, for tests that set other limits."""

    def __init__(self, classifier: Classifier, limits: Limits | None = None, access: Access | None = None) -> None:
        limits = limits or Limits()
        application = create_app(classifier, limits, access)
        config = uvicorn.Config(
            application, port=0, http=protocol(limits), ws="none", access_log=False, log_level="critical"
        )
        self.socket = config.bind_socket()
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))

    def __enter__(self) -> Server:
        self.thread.start()
        port = self.socket.getsockname()[1]
        wait_until_ready(f"http://127.0.0.1:{port}")
        return Server(f"http://127.0.0.1:{port}", port)

    def __exit__(self, *args: object) -> None:
        self.server.should_exit = True
        self.thread.join()


def start_process(weights: Path, *flags: str) -> tuple[subprocess.Popen[str], Server]:
    command = [sys.executable, "-m", "convmixer", "serve", str(weights), "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    line = process.stdout.readline()
    found = re.search(r"(http://[\d.]+:(\d+))", line)
    assert found, line + process.communicate()[1]
    wait_until_ready(found[1])
    return process, Server(found[1], int(found[2]), process.pid)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header promises far more pixels than its few bytes hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def multipart(parts: int, body: bytes = b"x", name: str = "a.png") -> tuple[bytes, dict[str, str]]:
    part = f'--b\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode() + body + b"\r\n"
    return part * parts + b"--b--\r\n", {"content-type": "multipart/form-data; boundary=b"}


def raw(port: int, data: bytes, wait: float = 20.0) -> bytes:
    """Send only these bytes, and return what the server sends until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def head(length: int, kind: str = "image/png", host: str = "localhost") -> bytes:
    """Return the head of a request to classify."""
    lines = f"Host: {host}\r\nContent-Type: {kind}\r\nContent-Length: {length}"
    return f"POST /v1/predict HTTP/1.1\r\n{lines}\r\n\r\n".encode()
