"""Inputs of `predict`: patterns, URLs with all their traps, names that could be two things; pictures with labels."""

import http.server
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convmixer.cli import main
from convmixer.errors import RequestError
from convmixer.predict import web
from convmixer.predict.files import predict_files
from convmixer.predict.sources import Video, sources_of
from convmixer.results.labelled import with_labels
from data_sets import png
from file_server import running


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four real scans, two of them in a folder below, and a text."""
    root = tmp_path_factory.mktemp("scans")
    (root / "more").mkdir()
    for index, name in ((0, "a.png"), (1, "b.png"), (2, "more/c.png"), (3, "more/d.PNG")):
        (root / name).write_bytes(png(index))
    (root / "notes.txt").write_text("no image")
    return root


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with an image, and misbehaves by path."""

    def do_GET(self) -> None:
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2])
            self.end_headers()
        elif self.path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            self.drip(b"x" * web.CHUNK, 0.0)
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            self.drip(b"x", 0.05)
        elif self.path == "/cut.png":
            self.answer(png(0), more=10)
        elif self.path == "/text":
            self.answer(b"not an image")
        elif self.path == "/scan.png":
            self.answer(png(0))
        else:
            self.send_error(404)

    def answer(self, body: bytes, more: int = 0) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + more))
        self.end_headers()
        self.wfile.write(body)

    def drip(self, part: bytes, pause: float) -> None:
        try:
            for _ in range(100_000):
                self.wfile.write(part)
                time.sleep(pause)
        except OSError:
            pass

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)) as address:
        yield address


def names(*arguments: str | Path) -> list[str]:
    return [Path(source.name).name for source in sources_of(arguments)[0]]


def test_a_pattern_finds_images_in_order(scans: Path) -> None:
    assert names(f"{scans}/*.png") == ["a.png", "b.png"]
    assert names(f"{scans}/**/*.[pP][nN][gG]") == ["a.png", "b.png", "c.png", "d.PNG"]
    assert names(f"{scans}/**") == ["a.png", "b.png", "c.png", "d.PNG"]  # the text is no image
    assert names(f"{scans}/mo*") == ["c.png", "d.PNG"]  # a folder
    for pattern in (f"{scans}/*.jpg", f"{scans}/*.txt"):
        with pytest.raises(RequestError, match="no image matches"):
            sources_of([pattern])


def test_a_name_that_exists_is_that_file(scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("[ab].png", "camera:0", "a.png", "b.png"):
        Path(name).write_bytes(png(0))
    assert names("[ab].png") == ["[ab].png"]
    assert not isinstance(sources_of(["camera:0"])[0][0], Video)
    Path("camera:0").unlink()
    assert sources_of(["camera:0"])[0] == [Video("camera:0", 0)]
    with pytest.raises(RequestError, match="write camera:0"):
        sources_of(["camera:front"])


def test_urls_are_read_only_if_asked(site: str, digits_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{site}/scan.png"
    assert main(["predict", str(digits_weights), url]) == 2
    assert "only if you add --allow-network" in capsys.readouterr().err
    assert main(["predict", str(digits_weights), url, "--allow-network", "--json", "--topk", "1"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])["predictions"][0]
    assert (answer["file"], answer["classes"]) == (url, ["0"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nothing", "answers 404"),
        ("/loop", "redirects"),
        ("/to?file:///etc/passwd", "redirect to file: is not followed"),
        ("/to?ftp://example.org/a.png", "redirect to ftp: is not followed"),
        ("/to?http://localhost:1/a.png", "inside this network"),  # another host than the one typed
        ("/to?http://169.254.169.254/latest", "inside this network"),
        ("/cut.png", "incomplete"),
        ("/endless", "not an image to classify"),
        ("/slow", "takes more than"),
    ],
)
def test_a_server_that_misleads_is_refused(
    site: str, path: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(web, "SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises((OSError, ValueError), match=message):
        web.fetch(site + path)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("host", ["127.0.0.1.nip.io", "internal.example"])
def test_a_name_never_leads_into_this_network(host: str, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a name is resolved to, private addresses are used only if typed."""
    found = [(2, 1, 6, "", ("127.0.0.1", 0)), (2, 1, 6, "", ("10.0.0.1", 0)), (10, 1, 6, "", ("::ffff:127.0.0.1", 0))]
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **more: found)
    with pytest.raises(OSError, match="inside this network"):
        web.fetch(f"http://{host}:{site.rpartition(':')[2]}/scan.png")


def test_a_redirect_on_the_typed_host_is_followed(site: str) -> None:
    assert web.fetch(f"{site}/to?/scan.png") == png(0)


def test_urls_with_secrets_or_without_a_host_are_refused() -> None:
    for url in ("http://user:secret@127.0.0.1/a.png", "http:///a.png", "http://127.0.0.1:99999/a.png"):
        with pytest.raises(ValueError, match=r"password|no host|[Pp]ort"):
            web.fetch(url)


def test_labels_are_drawn_into_numbered_pictures(scans: Path, digits_weights: Path, tmp_path: Path) -> None:
    twice = [scans / "a.png", scans / "a.png", scans / "b.png"]
    done = predict_files(digits_weights, twice, draw=tmp_path / "drawn")
    assert [Path(path).name for path in done["drawn"]] == ["00001-a.jpg", "00002-a.jpg", "00003-b.jpg"]
    with Image.open(done["drawn"][0]) as picture:
        assert min(picture.size) >= 240  # an 8 x 8 scan would hold no letters
    for path in (scans / "a.png", tmp_path / "labelled.mp4"):
        with pytest.raises(RequestError, match="--draw"):
            predict_files(digits_weights, twice, draw=path)


@pytest.mark.parametrize("size", [(8, 8), (1, 5000), (6000, 2), (640, 480)])
def test_labels_fit_into_any_picture(size: tuple[int, int]) -> None:
    picture = with_labels(Image.new("L", size, 128), [("x" * 300, 1.0), ("犬\udce9$\\x$", 0.0)])
    pixels = np.asarray(picture)
    assert max(pixels.shape) <= 4096
    assert (pixels[-1] != 128).any()
