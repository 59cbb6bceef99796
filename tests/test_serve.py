"""The HTTP API over real sockets: right answers, refusals with their reason, limits, batching, a clean end."""

import asyncio
import dataclasses
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from convmixer.errors import RequestError
from convmixer.exported.check import Images
from convmixer.exported.export import export_model
from convmixer.inference import Classifier, load_classifier
from convmixer.models.create import create_model
from convmixer.preprocess import Preprocessing
from convmixer.serve import app
from convmixer.serve.app import Limits, create_app, read_token
from convmixer.serve.batching import Batcher
from convmixer.serve.http import Protocol

CLASSES = ("apple", "bread", "cheese")
P = Preprocessing(img_size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
PNG = {"content-type": "image/png"}


def picture(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (20, 24)) -> bytes:
    from sklearn.datasets import load_sample_image

    photo = load_sample_image("flower.jpg")
    top, left = 10 * seed % 300, 7 * seed % 500
    buffer = io.BytesIO()
    Image.fromarray(photo[top : top + 120, left : left + 120]).resize(size).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network as an ONNX file, so that the server starts without torch."""
    torch.manual_seed(0)
    model = create_model("convmixer_8_1_p4_k3", num_classes=3).eval()
    path = tmp_path_factory.mktemp("serve") / "tiny.onnx"
    images = [Image.open(io.BytesIO(picture(seed))) for seed in range(8)]
    export_model(model, CLASSES, P, Images("photograph", images, None, ()), path, about={"architecture": "tiny"})
    return path


@pytest.fixture(scope="module")
def classifier(weights: Path) -> Classifier:
    return load_classifier(weights)


@dataclass
class Server:
    address: str
    port: int
    pid: int = 0

    def post(self, body: bytes, headers: dict[str, str] = PNG, query: str = "") -> httpx.Response:
        return httpx.post(f"{self.address}/v1/predict{query}", content=body, headers=headers, timeout=20)


def wait_until_ready(address: str) -> None:
    for _ in range(200):
        try:
            if httpx.get(f"{address}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("the server did not start")


class Running:
    """A server in a thread of this process, for limits of its own."""

    def __init__(self, classifier: Classifier, limits: Limits, token: str | None = None) -> None:
        protocol = type("Quick", (Protocol,), {"head_seconds": limits.send_seconds})
        application = create_app(classifier, limits, token)
        config = uvicorn.Config(application, port=0, http=protocol, ws="none", access_log=False, log_level="critical")
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


@pytest.fixture(scope="module")
def server(weights: Path) -> Iterator[Server]:
    process, server = start_process(weights, "--max-body-mb", "1", "--max-pixels", "400000", "--max-images", "4")
    yield server
    process.terminate()
    process.communicate(timeout=20)


def test_predictions_equal_those_of_the_classifier(server: Server, classifier: Classifier) -> None:
    body = picture(1)
    expected = classifier.predict([Image.open(io.BytesIO(body))], 3)[0]
    answer = server.post(body).json()["predictions"][0]
    assert answer["classes"] == [name for name, _ in expected]
    np.testing.assert_allclose(answer["probabilities"], [share for _, share in expected], atol=1e-6)


def test_many_images_come_back_in_order(server: Server) -> None:
    bodies = [picture(seed, kind) for seed, kind in enumerate(("PNG", "JPEG", "WEBP", "BMP"))]
    alone = [server.post(body).json()["predictions"][0] for body in bodies]
    files = [("image", (f"../../etc/{n}", body, "image/png")) for n, body in enumerate(bodies)]
    together = httpx.post(f"{server.address}/v1/predict", files=files).json()["predictions"]
    assert [p["classes"] for p in together] == [p["classes"] for p in alone]
    for one, many in zip(alone, together, strict=True):
        np.testing.assert_allclose(one["probabilities"], many["probabilities"], atol=1e-5)


def test_evidence_holds_what_was_seen_and_a_map_per_class(server: Server) -> None:
    answer = server.post(picture(), query="?explain=true&topk=2").json()["predictions"][0]
    assert np.array(answer["evidence"]["maps"]).shape == (3, 4, 4)
    assert answer["evidence"]["seen"].startswith("data:image/png;base64,")
    assert len(answer["classes"]) == 2


def test_model_health_metrics_and_docs_answer(server: Server) -> None:
    model = httpx.get(f"{server.address}/v1/model").json()
    assert (model["name"], model["classes"]) == ("tiny", list(CLASSES))
    assert httpx.get(f"{server.address}/healthz").json() == {"status": "ok"}
    server.post(picture())
    metrics = httpx.get(f"{server.address}/metrics").text
    assert 'convmixer_requests_total{path="/v1/predict",status="200"}' in metrics
    page = httpx.get(f"{server.address}/docs")
    assert page.status_code == 200
    assert "//" not in re.sub(r"<!doctype.*?>", "", page.text)  # no address of another host
    assert httpx.get(f"{server.address}/openapi.json").json()["paths"].keys() >= {"/v1/predict", "/v1/model"}
    assert "default-src 'none'" in page.headers["content-security-policy"]


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


KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SLOW_BMP = picture(0, "BMP")[:28] + struct.pack("<HI", 8, 1) + picture(0, "BMP")[34:]  # run-length encoded, it says
BAD = {
    "slow PGM": (b"P5\n20 20\n254\n" + bytes(400), PNG, 422, "bad_image"),
    "slow BMP": (SLOW_BMP, PNG, 422, "bad_image"),
    "empty": (b"", PNG, 400, "empty"),
    "text": (b"hello, I am no image", PNG, 422, "bad_image"),
    "html": (b"<html><script>alert(1)</script></html>", PNG, 422, "bad_image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', {"content-type": "image/svg+xml"}, 422, "bad_image"),
    "zeros": (bytes(5000), PNG, 422, "bad_image"),
    "wrong type": (picture(), {"content-type": "text/plain"}, 415, "unsupported_type"),
    "no type": (picture(), {}, 415, "unsupported_type"),
    "json": (b"{}", {"content-type": "application/json"}, 415, "unsupported_type"),
    "too long": (bytes(3 << 20), PNG, 413, "body_too_large"),
    "bomb": (png_claiming(30_000, 30_000), PNG, 422, "bad_image"),  # above Pillow's own limit
    "large": (png_claiming(5000, 5000), PNG, 413, "too_many_pixels"),
    "long": (png_claiming(2_000_000_000, 1), PNG, 422, "bad_image"),
    "truncated claim": (png_claiming(600, 600), PNG, 422, "bad_image"),
    "no boundary": (b"x", {"content-type": "multipart/form-data"}, 400, "bad_multipart"),
    "broken form": (b"nonsense", {"content-type": "multipart/form-data; boundary=b"}, 400, "bad_multipart"),
    "cut form": (multipart(1)[0][:-12], multipart(1)[1], 400, "bad_multipart"),
    "no parts": (b"--b--\r\n", {"content-type": "multipart/form-data; boundary=b"}, 400, None),
    "10,000 parts": (*multipart(10_000), 413, "too_many_images"),
    "one bad among good": (
        multipart(2, picture())[0][:-7] + multipart(1, b"bad")[0], multipart(1)[1], 422, "bad_image",
    ),
    "path in name": (*multipart(1, b"bad", "../../../etc/passwd"), 422, "bad_image"),
    **{f"half a {kind}": (picture(0, kind)[: len(picture(0, kind)) // 2], PNG, 422, "bad_image") for kind in KINDS},
    **{f"head of {kind}": (picture(0, kind)[:20], PNG, 422, "bad_image") for kind in KINDS},
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_its_status_and_reason(server: Server, case: str) -> None:
    body, headers, status, code = BAD[case]
    answer = server.post(body, headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert code is None or error["code"] == code
    assert error["message"]
    assert "passwd" not in answer.text
    assert httpx.get(f"{server.address}/healthz").status_code == 200


@pytest.mark.parametrize("kind", KINDS)
def test_corrupt_images_are_answered_or_refused_but_never_fail(server: Server, kind: str) -> None:
    random = np.random.default_rng(0)
    for _ in range(10):
        body = bytearray(picture(0, kind))
        for position in random.integers(0, len(body), 8):
            body[position] = random.integers(256)
        assert server.post(bytes(body)).status_code in (200, 413, 422)


def test_bad_parameters_paths_and_methods_are_refused_in_json(server: Server) -> None:
    for query in ("?topk=0", "?topk=99", "?topk=x", "?explain=perhaps"):
        answer = server.post(picture(), query=query)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "bad_parameter")
    for path in ("/nope", "/..%2f..%2fetc/passwd", "/page.css/../app.py", "/static//etc/passwd"):
        answer = httpx.get(server.address + path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert httpx.get(f"{server.address}/v1/predict").json()["error"]["code"] == "method_not_allowed"


def resident_megabytes(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
def test_memory_returns_after_bad_input(server: Server) -> None:
    def everything() -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda case: server.post(*BAD[case][:2]), list(BAD) * 2))

    everything()  # fills the pools that stay
    before = resident_megabytes(server.pid)
    for _ in range(3):
        everything()
    time.sleep(0.3)
    assert resident_megabytes(server.pid) < before + 16  # 100 requests of which many hold megabytes


def raw(port: int, data: bytes, wait: float = 5.0) -> bytes:
    """Send bytes, send no more, and return what the server says until it hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


@pytest.mark.parametrize(
    "start",
    [b"", b"POST /v1/pre", b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow: 1", b"POST /v1/predict HTTP/1.1\r\nHost: a\r\n"
     b"Content-Type: image/png\r\nContent-Length: 1000\r\n\r\npart"],
    ids=["silent", "half a line", "half a head", "half a body"],
)  # fmt: skip
def test_slow_clients_are_hung_up_on(classifier: Classifier, start: bytes) -> None:
    with Running(classifier, Limits(send_seconds=0.3)) as server:
        answer = raw(server.port, start)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"too_slow"' in answer
        assert server.post(picture()).status_code == 200


def slow(classifier: Classifier, seconds: float, sizes: list[int]) -> Classifier:
    """The same classifier, with a pause before each batch."""

    def logits(batch: np.ndarray) -> np.ndarray:
        sizes.append(len(batch))
        time.sleep(seconds)
        return classifier.logits(batch)

    return Classifier(logits, classifier.classes, classifier.preprocessing, classifier.describe)


def test_requests_that_arrive_together_are_computed_together(classifier: Classifier) -> None:
    sizes: list[int] = []
    with Running(slow(classifier, 0.1, sizes), Limits()) as server, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda seed: server.post(picture(seed)), range(16)))
    assert [answer.status_code for answer in answers] == [200] * 16
    assert max(sizes) >= 4
    expected = [classifier.predict([Image.open(io.BytesIO(picture(seed)))], 1)[0][0][0] for seed in range(16)]
    assert [answer.json()["predictions"][0]["classes"][0] for answer in answers] == expected


def test_a_full_queue_is_503_with_retry_after(classifier: Classifier) -> None:
    limits = Limits(images=2, queue=2, batch=1)
    with Running(slow(classifier, 0.2, []), limits) as server, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda seed: server.post(picture(seed)), range(12)))
    found = {answer.status_code for answer in answers}
    assert found == {200, 503}
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.json()["error"]["code"] == "busy"
    assert int(refused.headers["retry-after"]) > 0


def test_an_answer_that_takes_too_long_is_504(classifier: Classifier) -> None:
    with Running(slow(classifier, 1.0, []), Limits(answer_seconds=0.2)) as server:
        answer = server.post(picture())
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "too_late")


def test_a_token_guards_the_api_but_not_the_page(classifier: Classifier) -> None:
    with Running(classifier, Limits(), token="secret") as server:
        assert httpx.get(server.address).status_code == 200
        assert httpx.get(f"{server.address}/readyz").status_code == 200
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            answer = server.post(picture(), PNG | given)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorised")
            assert httpx.get(f"{server.address}/v1/model", headers=given).status_code == 401
            assert httpx.get(f"{server.address}/metrics", headers=given).status_code == 401
        assert server.post(picture(), PNG | {"authorization": "Bearer secret"}).status_code == 200


def test_sigterm_finishes_what_was_accepted_and_exits_0(weights: Path) -> None:
    process, server = start_process(weights)
    body = picture()
    head = f"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head.encode() + body[:10])
        time.sleep(0.3)  # the request is accepted, half its body is still to come
        os.kill(server.pid, signal.SIGTERM)
        time.sleep(0.3)
        connection.sendall(body[10:])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "Traceback" not in out + err


def test_serving_an_onnx_file_imports_no_torch(weights: Path) -> None:
    code = (
        "import sys\n"
        "from convmixer.inference import load_classifier\n"
        "from convmixer.serve.app import create_app\n"
        f"create_app(load_classifier({str(weights)!r}))\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_a_taken_port_is_one_clear_error(weights: Path, server: Server) -> None:
    command = [sys.executable, "-m", "convmixer", "serve", str(weights), "--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "is the port taken?" in done.stderr


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_cannot_be_is_refused(port: int) -> None:
    with pytest.raises(RequestError, match="from 0 to 65535"):
        app.serve("none", port=port)


def test_a_failing_model_is_500_for_its_requests_and_the_queue_goes_on() -> None:
    async def scenario() -> list[str]:
        def compute(batch: np.ndarray, explain: bool) -> tuple[np.ndarray, None]:
            if batch.max() > 1:
                raise ValueError("bad batch")
            return batch.reshape(len(batch), -1), None

        batcher = Batcher(compute, max_batch=1, max_queue=9)
        batcher.start()
        results = await asyncio.gather(
            *(batcher.submit([np.full((1, 1, 1), v, np.float32)], False) for v in (0, 2, 1)), return_exceptions=True
        )
        await batcher.stop()
        return [type(result).__name__ for result in results]

    assert asyncio.run(scenario()) == ["list", "ValueError", "list"]


def test_a_failing_model_is_a_500_that_is_counted(classifier: Classifier) -> None:
    calls: list[int] = []

    def logits(batch: np.ndarray) -> np.ndarray:
        calls.append(len(batch))
        if len(calls) > 1:  # the first one warms up
            raise ValueError("broken")
        return np.zeros((len(batch), 3), np.float32)

    with Running(dataclasses.replace(classifier, logits=logits, with_maps=None), Limits()) as server:
        answer = server.post(picture())
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
        assert answer.headers["x-content-type-options"] == "nosniff"
        metrics = httpx.get(f"{server.address}/metrics").text
        assert 'convmixer_requests_total{path="/v1/predict",status="500"} 1.0' in metrics


def test_an_answer_that_is_not_a_number_is_500(classifier: Classifier) -> None:
    def logits(batch: np.ndarray) -> np.ndarray:
        return np.full((len(batch), 3), np.nan, np.float32)

    with Running(dataclasses.replace(classifier, logits=logits, with_maps=None), Limits()) as server:
        answer = server.post(picture())
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "not_a_number")


def test_bodies_held_are_bounded(classifier: Classifier) -> None:
    limits = Limits(body_bytes=1000, held_bytes=1500, send_seconds=5)
    with Running(classifier, limits) as server, socket.create_connection(("127.0.0.1", server.port)) as slow:
        head = "POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 900\r\n\r\n"
        slow.sendall(head.encode() + b"1" * 10)
        time.sleep(0.3)
        refused = server.post(b"2" * 900)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "busy")
        assert server.post(b"2" * 500).status_code == 422  # there is room for this one
        slow.sendall(b"1" * 890)
        assert b"422" in slow.recv(100)
        assert server.post(b"2" * 900).status_code == 422


def test_pixels_decoded_at_once_are_bounded(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, lock = app.load_image, threading.Lock()
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

    monkeypatch.setattr(app, "load_image", load)
    monkeypatch.setattr(app, "DECODING_PIXELS", 1000)
    monkeypatch.setattr(app.os, "cpu_count", lambda: 8)
    with Running(classifier, Limits()) as server:
        images = (picture(), picture(size=(40, 40)), *[picture(size=(10, 50))] * 4)  # 480, 1600, 500 pixels
        body = b"".join(multipart(1, image)[0].removesuffix(b"--b--\r\n") for image in images) + b"--b--\r\n"
        answer = server.post(body, multipart(1)[1])
        assert len(answer.json()["predictions"]) == 6
    assert max(most) == 1600  # the large one alone
    assert 1000 in most or 980 in most


def test_limits_that_would_refuse_everything_are_refused() -> None:
    with pytest.raises(RequestError, match="queue must be above 0"):
        Limits(queue=0)
    with pytest.raises(RequestError, match="would never be taken"):
        Limits(images=300)


def test_a_token_that_cannot_be_sent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVMIXER_TOKEN", "secret\n")
    assert read_token(None) == "secret"
    file = tmp_path / "token"
    for content, message in ((b" \n", "is empty"), ("schlüssel".encode(), "ASCII"), (b"\xff", "cannot read")):
        file.write_bytes(content)
        with pytest.raises(RequestError, match=message):
            read_token(file)


def test_fuzzing_from_the_description_finds_no_server_error(server: Server) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import schemathesis
        from hypothesis import HealthCheck, Phase, given, seed, settings

        schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 5
    quick = settings(
        max_examples=25,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for operation in operations:

        @seed(0)
        @quick
        @given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            response = case.call()
            assert response.status_code < 500
            if response.status_code >= 400:
                assert set(json.loads(response.text)["error"]) == {"code", "message"}

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check()
