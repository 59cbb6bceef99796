"""100 odd HTTP exchanges with a real server over sockets: right answers or clear refusals, and it keeps serving."""

import contextlib
import json
import re
import socket
from itertools import product

import httpx
from fault_runs import report

from serving import Server, multipart, picture

GOOD = picture()
LINES = [
    b"GET /healthz HTTP/1.1",
    b"HEAD / HTTP/1.1",
    b"OPTIONS * HTTP/1.1",
    b"TRACE / HTTP/1.1",
    b"GET / HTTP/0.9",
    b"GET /",
    b"GET / HTTP/9.9",
    b"\x16\x03\x01\x02\x00\x01",
    b"PRI * HTTP/2.0",
    b"get / http/1.1",
    b"GET  /  HTTP/1.1",
    b"GET /\x00 HTTP/1.1",
    b"GET /%00%ff%2e%2e HTTP/1.1",
    b"GET //etc/passwd HTTP/1.1",
    b"GET /../../etc/passwd HTTP/1.1",
    b"GET /page.css/%2e%2e/app.py HTTP/1.1",
    b"GET http://[::1/ HTTP/1.1",
    b"GET /?topk=" + b"9" * 9000 + b" HTTP/1.1",
    b"CONNECT localhost:22 HTTP/1.1",
    b"PUT /v1/predict HTTP/1.1",
    b"DELETE /v1/model HTTP/1.1",
    b"GET /v1/predict HTTP/1.1",
    b"POST / HTTP/1.1",
    b"POST /v1/model HTTP/1.1",
    b"A" * 300 + b" / HTTP/1.1",
]
HEADERS = [
    b"Content-Length: -1",
    b"Content-Length: 1e3",
    b"Content-Length: 99999999999999999999",
    b"Content-Length: 5, 5",
    b"Content-Length: 5\r\nContent-Length: 6",
    b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: gzip",
    b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: xchunked",
    b"Expect: 100-continue\r\nContent-Length: 5",
    b"Expect: a miracle\r\nContent-Length: 5",
    b"Upgrade: websocket\r\nConnection: Upgrade",
    b"Upgrade: h2c\r\nConnection: Upgrade",
    b"Range: bytes=0-0,-1",
    b"Content-Encoding: gzip\r\nContent-Length: 5",
    b"Host: evil.example",
    b": empty",
    b"no colon",
    b" folded: line",
    b"X\x00Y: z",
    b"Origin: null\r\nContent-Length: 5",
    b"Authorization: Bearer \xff\xfe",
    b"Cookie: " + b"a=b;" * 2000,
    b"Accept: ../../*",
    b"Connection: close, keep-alive, \xff",
]
FORM, KIND = multipart(2, GOOD)
BODIES = [
    (b"image/png", b""),
    (b"image/png", b"\x89PNG"),
    (b"image/png; " + b"a=b;" * 3000, GOOD),
    (b"IMAGE/PNG", GOOD),
    (b"image/", GOOD),
    (b"text/html", GOOD),
    (b"", GOOD),
    (b"image/png\xff", GOOD),
    (b"application/json", b"[" * 100_000),
    (b"multipart/form-data", FORM),
    (b"multipart/form-data; boundary=", FORM),
    (b"multipart/form-data; boundary=x", FORM),
    (b"multipart/form-data; boundary=" + b"b" * 500, FORM),
    (b'multipart/form-data; boundary="b"', FORM),
    (b"multipart/form-data; boundary=b", FORM[:-9]),
    (b"multipart/form-data; boundary=b", FORM[5:]),
    (b"multipart/form-data; boundary=b", FORM.replace(b"\r\n", b"\n")),
    (b"multipart/form-data; boundary=b", b"--b--"),
    (b"multipart/form-data; boundary=b", FORM.replace(b"Content-Disposition", b"X")),
    (b"multipart/form-data; boundary=b", FORM.replace(b"filename", b"name*")),
    (b"multipart/form-data; boundary=b", b"--b\r\n\r\n\r\n" * 1000 + b"--b--"),
    (b"multipart/mixed; boundary=b", FORM),
    (b"multipart/form-data; boundary=b", FORM + FORM),
    (b"application/octet-stream", b"GIF89a" + bytes(100)),
    (b"application/x-www-form-urlencoded", b"topk=1"),
]
CHUNKED = [
    b"5\r\nabcde\r\n0\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b"-1\r\n",
    b"5\r\nabc",
    b"0\r\nX: y\r\n\r\n",
    b"5;a=b\r\nabcde\r\n0\r\n\r\n",
    b"zz\r\n",
    b"\r\n\r\n",
    b"00000000000000005\r\nabcde\r\n0\r\n\r\n",
    b"5\nabcde\n0\n\n",
]
PREDICT = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\n"


def exchanges() -> dict[str, list[bytes]]:
    """Return what is sent, by kind."""
    asks = [PREDICT + b"Content-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (k, len(b), b) for k, b in BODIES]
    length = b"Content-Length: %d\r\n\r\n" % len(GOOD)
    queries = [
        b"topk=0",
        b"topk=1&topk=2",
        b"explain=%ff",
        b"topk=1;explain",
        b"=&&=",
        b"topk=" + "١".encode().hex().encode(),
    ]
    queries += [
        b"a[b][c]=1" * 100,
        b"?" * 1000,
        b"topk=1e0",
        b"topk= 1",
        b"explain=2",
        b"topk=%00",
        b"topk=1#x",
        b"\xff",
        b"%",
    ]
    return {
        "request lines": [line + b"\r\nHost: localhost\r\n\r\n" for line in LINES],
        "headers": [PREDICT + b"Content-Type: image/png\r\n" + header + b"\r\n\r\nabcde" for header in HEADERS],
        "bodies": asks,
        "chunks": [PREDICT + b"Content-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n" + c for c in CHUNKED],
        "queries": [
            PREDICT.replace(b"predict", b"predict?" + query) + b"Content-Type: image/png\r\n%b" % length + GOOD
            for query in queries
        ],
    }


def exchange(server: Server, data: bytes) -> str | None:
    """Send bytes and no more; return what was wrong with the answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=15) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                answer += part
    status = re.match(rb"HTTP/1.[01] (\d+)", answer)
    if answer and not status:
        return f"no HTTP: {answer[:80]!r}"
    if status and int(status[1]) >= 500:
        return f"a failure of the server: {answer[:300]!r}"
    head, _, body = answer.partition(b"\r\n\r\n")
    if status and int(status[1]) >= 400 and b"application/json" in head and body:
        json.loads(body.partition(b"HTTP/1.1")[0])["error"]["message"]
    if b"root:" in answer or b"Traceback" in answer:
        return f"it tells too much: {answer[:300]!r}"
    return None


def test_odd_exchanges(server: Server) -> None:
    assert sum(map(len, exchanges().values())) >= 100
    for kind, sent in exchanges().items():
        report(kind, sent, lambda data: exchange(server, data))  # type: ignore[arg-type]
    with httpx.Client() as client:
        for _, path in product(range(2), ("/healthz", "/v1/model")):
            assert client.get(server.address + path).status_code == 200
    assert server.post(GOOD).status_code == 200
