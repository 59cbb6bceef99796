"""Pictures of the user's data are shown on a page only if the user asks for it, without place and time."""

import io
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from PIL import Image
from tests.tiny_onnx import SOUND, model, saved

from convmixer.errors import RequestError
from convmixer.exported.samples import choose_samples
from convmixer.serve.server import is_loopback


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an export and two samples, one of them a large photo with a position in its EXIF notes."""
    run = tmp_path_factory.mktemp("a") / "run"
    (run / "samples").mkdir(parents=True)
    (run / "exports").mkdir()
    (run / "config.yaml").write_text("command: convmixer train photos\n")
    Image.new("RGB", (8, 8), "red").save(run / "samples" / "0.png")
    exif = Image.Exif()
    exif[0x8825] = {1: "N", 2: (52.0, 30.0, 0.0)}
    Image.new("RGB", (2000, 1000), "blue").save(run / "samples" / "1.jpg", exif=exif)
    saved(run / "exports" / "m.onnx", model(SOUND))
    return run


def sizes(pictures: list[bytes]) -> list[tuple[int, int]]:
    return [Image.open(io.BytesIO(picture)).size for picture in pictures]


def test_samples_of_a_run_or_folder_are_small_and_carry_no_notes(run: Path) -> None:
    for choice in (run, run / "samples"):
        pictures, said = choose_samples(str(choice))
        assert sizes(pictures) == [(8, 8), (640, 320)]
        assert not any(Image.open(io.BytesIO(picture)).getexif() for picture in pictures)
        assert said == f"sample pictures: 2 of {run / 'samples'}"


def test_none_and_no_choice_show_nothing_and_say_so(run: Path) -> None:
    assert choose_samples("none", [run / "samples" / "0.png"]) == ([], "no sample pictures")
    assert choose_samples(None) == ([], "no sample pictures (--samples RUN or FOLDER adds some)")
    assert sizes(choose_samples(None, [run / "samples" / "0.png"])[0]) == [(8, 8)]


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such folder"):
        choose_samples(str(tmp_path / "nothing"))
    with pytest.raises(RequestError, match="no image files"):
        choose_samples(str(tmp_path))
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(RequestError, match=r"a\.png"):
        choose_samples(str(tmp_path))


def served_samples(run: Path, *flags: str) -> tuple[int, str]:
    """Return how many pictures the page of `convmixer serve` offers, and what the command prints about them."""
    command = [sys.executable, "-m", "convmixer", "serve", str(run / "exports" / "m.onnx"), "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    port = re.search(r"http://[\d.]+:(\d+)", process.stdout.readline())
    said = process.stdout.readline()
    assert port
    transport = httpx.HTTPTransport(retries=50)
    with httpx.Client(transport=transport, timeout=30) as client:
        model = client.get(f"http://127.0.0.1:{port[1]}/v1/model").json()
    process.terminate()
    process.communicate(timeout=30)
    return len(model["samples"]), said.strip()


def test_a_server_open_to_others_shows_samples_only_if_asked(run: Path) -> None:
    shown = f"sample pictures: 2 of {run / 'samples'}"
    assert served_samples(run) == (2, shown)
    assert served_samples(run, "--host", "0.0.0.0")[0] == 0
    assert served_samples(run, "--host", "0.0.0.0", "--samples", str(run)) == (2, shown)
    assert served_samples(run, "--samples", "none") == (0, "no sample pictures")


def test_only_this_machine_connects_to_a_loopback_address() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.5", "example.com", "")))
