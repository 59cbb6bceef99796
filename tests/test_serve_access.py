"""Access control: token, Host, Origin, a URL prefix behind a proxy; over real sockets."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from convmixer.errors import RequestError
from convmixer.inference import Classifier
from convmixer.serve.access import Access
from convmixer.serve.server import read_token
from serving import PNG, Running, head, picture, raw


def test_a_token_guards_the_api_but_not_the_page(serve_classifier: Classifier) -> None:
    with Running(serve_classifier, access=Access("secret")) as server:
        assert httpx.get(server.address).status_code == 200
        assert httpx.get(f"{server.address}/readyz").status_code == 200
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            answer = server.post(picture(), PNG | given)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorised")
            assert httpx.get(f"{server.address}/v1/model", headers=given).status_code == 401
            assert httpx.get(f"{server.address}/metrics", headers=given).status_code == 401
        assert server.post(picture(), PNG | {"authorization": "Bearer secret"}).status_code == 200


def test_a_token_that_cannot_be_sent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVMIXER_TOKEN", "secret\n")
    assert read_token(None) == "secret"
    file = tmp_path / "token"
    for content, message in ((b" \n", "is empty"), ("schlüssel".encode(), "ASCII"), (b"\xff", "cannot read")):
        file.write_bytes(content)
        with pytest.raises(RequestError, match=message):
            read_token(file)


def test_only_names_of_the_server_are_answered(serve_classifier: Classifier) -> None:
    """A site that points its name at this machine (DNS rebinding) could read the model and its pictures."""
    with Running(serve_classifier, access=Access(hosts=("Models.example",))) as server, httpx.Client() as client:
        for host in (
            "localhost",
            "127.0.0.1",
            f"127.0.0.1:{server.port}",
            "[::1]:80",
            "192.168.1.5",
            "models.example:80",
        ):
            assert client.get(f"{server.address}/v1/model", headers={"host": host}).status_code == 200, host
        for host in (
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "models.example.evil",
            "",
            "@localhost",
        ):
            for path in ("/v1/model", "/", "/healthz", "/nope"):
                answer = client.get(server.address + path, headers={"host": host})
                assert (answer.status_code, answer.json()["error"]["code"]) == (421, "wrong_host"), host
        twice = raw(
            server.port, b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
        )
        none = raw(server.port, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert twice.startswith(b"HTTP/1.1 400")
        assert none.startswith(b"HTTP/1.1 400")
        assert raw(server.port, b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")
        absolute = b"GET http://evil.example/v1/model HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
        assert raw(server.port, absolute).startswith(b"HTTP/1.1 421")
        assert raw(server.port, head(4, host="evil.example") + b"abcd").startswith(b"HTTP/1.1 421")


def test_pages_of_other_origins_may_not_ask(serve_classifier: Classifier) -> None:
    with Running(serve_classifier, access=Access(hosts=("models.example",))) as server:
        for origin in (server.address, "https://models.example", "http://localhost:5"):
            headers = PNG | {"origin": origin} | ({"host": "localhost:5"} if "localhost" in origin else {})
            assert server.post(picture(), headers).status_code == 200, origin
        for origin in ("https://evil.example", "null", "http://models.example.evil", "http://localhost:5"):
            answer = server.post(picture(), PNG | {"origin": origin})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_origin"), origin
            assert "access-control-allow-origin" not in answer.headers
            assert httpx.delete(server.address, headers={"origin": origin}).status_code == 403, origin


@pytest.mark.parametrize("origins", [("https://app.example",), ("*",)])
def test_cors_lets_the_origins_asked_for_in(serve_classifier: Classifier, origins: tuple[str, ...]) -> None:
    with Running(serve_classifier, access=Access("secret", origins=origins)) as server:
        asks = {"origin": "https://app.example", "access-control-request-method": "POST"}
        asks |= {"access-control-request-headers": "authorization,content-type"}
        preflight = httpx.options(f"{server.address}/v1/predict", headers=asks)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] in ("https://app.example", "*")
        headers = PNG | {"origin": "https://app.example", "authorization": "Bearer secret"}
        answer = server.post(picture(), headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] in ("https://app.example", "*")
        other = server.post(picture(), headers | {"origin": "https://evil.example"})
        assert other.status_code == (200 if origins == ("*",) else 403)


def test_a_path_behind_a_proxy_is_taken_with_and_without_it(serve_classifier: Classifier) -> None:
    with Running(serve_classifier, access=Access(root_path="/classify")) as server:
        for path in ("/classify/v1/model", "/v1/model", "/classify/", "/"):
            assert httpx.get(server.address + path).status_code == 200, path
        assert httpx.get(f"{server.address}/openapi.json").json()["servers"] == [{"url": "/classify"}]
        page = httpx.get(f"{server.address}/classify/").text
        assert 'href="/' not in page
        assert 'src="/' not in page


@pytest.mark.parametrize(
    "values",
    [{"hosts": ("http://a",)}, {"hosts": ("a/b",)}, {"origins": ("a.example",)}, {"origins": ("https://a/b",)},
     {"root_path": "classify"}, {"root_path": "/a b"}],
)  # fmt: skip
def test_wrong_names_are_refused_at_the_start(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="--"):
        Access(**values)
