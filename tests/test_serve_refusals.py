"""The HTTP API over real sockets: what is refused, with its status and reason."""

import re
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from convmixer.serve.body import split_form
from convmixer.serve.http import Refusal
from serving import NO_TLS, PNG, Server, multipart, picture, png_claiming

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SLOW_BMP = picture(0, "BMP")[:28] + struct.pack("<HI", 8, 1) + picture(0, "BMP")[34:]  # run-length encoded, it says
BAD = {
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
    assert httpx.get(f"{server.address}/healthz", verify=NO_TLS).status_code == 200


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
        answer = httpx.get(server.address + path, verify=NO_TLS)
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


@pytest.mark.parametrize("filler", [b"\r\n--", b"\r\n--bound", b"\r\n--boundarx\r\n", b"\r\n", b"-"])
def test_false_boundaries_cost_milliseconds(filler: bytes) -> None:
    """16 MiB of them took a state machine 15 s, during which nobody else was served."""
    part = b'--boundary\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n'
    content = filler * ((16 << 20) // len(filler))
    start = time.process_time()
    form = split_form(part + content + b"\r\n--boundary--", "multipart/form-data; boundary=boundary", 32)
    assert form.images == [content]
    with pytest.raises(Refusal, match="malformed"):
        split_form(part[:-4] + content, "multipart/form-data; boundary=boundary", 32)
    with pytest.raises(Refusal):
        split_form(part + b"\r\n--boundary\r\n" * 10**6, "multipart/form-data; boundary=boundary", 32)
    assert time.process_time() - start < 1


def test_long_names_and_many_fields_are_refused_at_once() -> None:
    kind = "multipart/form-data; boundary=b"
    long = b'--b\r\nContent-Disposition: form-data; name="' + b"a" * 100_000 + b'"\r\n\r\n1\r\n--b--'
    fields = b'--b\r\nContent-Disposition: form-data; name="topk"\r\n\r\n1\r\n' * 10_000 + b"--b--"
    for body, message in ((long, "malformed"), (fields, "once"), (b"--b", "malformed"), (b"", "malformed")):
        with pytest.raises(Refusal, match=message):
            split_form(body, kind, 32)
    with pytest.raises(Refusal, match="boundary"):
        split_form(b"--b--", f"multipart/form-data; boundary={'b' * 300}", 32)


def test_a_form_may_have_a_preamble_and_an_empty_file() -> None:
    body = b'preamble\r\n--b\r\nContent-Disposition: form-data; name="x"; filename="y"\r\n\r\n\r\n--b--\r\nepilogue'
    assert split_form(body, "multipart/form-data; boundary=b", 32).images == [b""]


def test_a_packed_body_is_refused_by_name(server: Server) -> None:
    answer = server.post(picture(), PNG | {"content-encoding": "gzip"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")
