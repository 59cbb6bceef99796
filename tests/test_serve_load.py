"""Batches, full queues, failing models, and a clean end; over real sockets."""

import asyncio
import dataclasses
import io
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from bombs import text_pixels
from convmixer.errors import RequestError
from convmixer.inference import Classifier
from convmixer.models.convmixer import ConvMixer
from convmixer.serve.batching import Batcher
from convmixer.serve.limits import Limits
from convmixer.serve.server import serve
from serving import Running, Server, head, picture, start_process


def slow(classifier: Classifier, seconds: float, sizes: list[int]) -> Classifier:
    """The same classifier, with a pause before each batch."""

    def logits(batch: np.ndarray) -> np.ndarray:
        sizes.append(len(batch))
        time.sleep(seconds)
        return classifier.logits(batch)

    return Classifier(logits, classifier.classes, classifier.preprocessing, classifier.describe)


def test_requests_that_arrive_together_are_computed_together(serve_classifier: Classifier) -> None:
    sizes: list[int] = []
    with Running(slow(serve_classifier, 0.1, sizes), Limits()) as server, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda seed: server.post(picture(seed)), range(16)))
    assert [answer.status_code for answer in answers] == [200] * 16
    assert max(sizes) >= 4
    expected = [serve_classifier.predict([Image.open(io.BytesIO(picture(seed)))], 1)[0][0][0] for seed in range(16)]
    assert [answer.json()["predictions"][0]["classes"][0] for answer in answers] == expected


def test_a_full_queue_is_refused_with_retry_after(serve_classifier: Classifier) -> None:
    limits = Limits(images=2, queue=2, batch=1)
    with Running(slow(serve_classifier, 0.2, []), limits) as server, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda seed: server.post(picture(seed)), range(12)))
    found = {answer.status_code for answer in answers}
    assert 200 in found
    assert found <= {200, 429, 503}
    refused = next(answer for answer in answers if answer.status_code != 200)
    assert refused.json()["error"]["code"] in ("busy", "too_many_requests")
    assert int(refused.headers["retry-after"]) > 0


def test_an_answer_that_takes_too_long_is_504(serve_classifier: Classifier) -> None:
    with Running(slow(serve_classifier, 1.0, []), Limits(answer_seconds=0.2)) as server:
        answer = server.post(picture())
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "too_late")


def test_sigterm_finishes_what_was_accepted_and_exits_0(serve_weights: Path) -> None:
    process, server = start_process(serve_weights)
    body = picture()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head(len(body)) + body[:10])
        time.sleep(0.3)  # the request is accepted, half its body is still to come
        os.kill(server.pid, signal.SIGTERM)
        time.sleep(0.3)
        connection.sendall(body[10:])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "Traceback" not in out + err


def test_what_was_loaded_and_assumed_is_printed(tmp_path: Path) -> None:
    torch.save(ConvMixer(4, 1, 3, 4, num_classes=2).state_dict(), tmp_path / "w.pth")
    process, server = start_process(tmp_path / "w.pth")
    assert process.stdout
    process.stdout.readline()  # about the pictures
    line = process.stdout.readline()
    os.kill(server.pid, signal.SIGTERM)
    process.communicate(timeout=20)
    assert line.startswith("model: timm keys: dim 4, depth 1, kernel_size 3")
    assert "assumed 32 px, mean (0.4914, 0.4822, 0.4465)" in line


def test_a_taken_port_is_one_clear_error(serve_weights: Path, server: Server) -> None:
    command = [sys.executable, "-m", "convmixer", "serve", str(serve_weights), "--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "is the port taken?" in done.stderr


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_cannot_be_is_refused(port: int) -> None:
    with pytest.raises(RequestError, match="from 0 to 65535"):
        serve("none", port=port)


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

    with ThreadPoolExecutor(1) as thread:  # while a browser is open, this thread has a running loop
        assert thread.submit(asyncio.run, scenario()).result() == ["list", "ValueError", "list"]


def test_a_failing_model_is_a_500_that_is_counted(serve_classifier: Classifier) -> None:
    calls: list[int] = []

    def logits(batch: np.ndarray) -> np.ndarray:
        calls.append(len(batch))
        if len(calls) > 1:  # the first one warms up
            raise ValueError("broken")
        return np.zeros((len(batch), 3), np.float32)

    with Running(dataclasses.replace(serve_classifier, logits=logits, with_maps=None), Limits()) as server:
        answer = server.post(picture())
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
        assert answer.headers["x-content-type-options"] == "nosniff"
        metrics = httpx.get(f"{server.address}/metrics").text
        assert 'convmixer_requests_total{path="/v1/predict",status="500"} 1.0' in metrics


def test_an_answer_that_is_not_a_number_is_500(serve_classifier: Classifier) -> None:
    def logits(batch: np.ndarray) -> np.ndarray:
        return np.full((len(batch), 3), np.nan, np.float32)

    with Running(dataclasses.replace(serve_classifier, logits=logits, with_maps=None), Limits()) as server:
        answer = server.post(picture())
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "not_a_number")
        assert "NaN or infinite" in answer.json()["error"]["message"]


def test_limits_that_would_refuse_everything_are_refused() -> None:
    with pytest.raises(RequestError, match="queue must be above 0"):
        Limits(queue=0)
    with pytest.raises(RequestError, match="would never be accepted"):
        Limits(images=300)


def test_sigterm_does_not_wait_for_a_slow_image(serve_weights: Path) -> None:
    process, server = start_process(serve_weights, "--max-body-mb", "100", "--timeout", "1")
    body = text_pixels()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head(len(body)) + body)
        time.sleep(0.7)
        start = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        assert b"504" in connection.recv(65536)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert time.monotonic() - start < 6
    assert "Traceback" not in out + err
