"""Untrusted images: files that would decode for minutes or fill the memory end in one error, within seconds."""

import io
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from bombs import (
    encoded,
    gif_comment,
    jpeg_with_exif,
    overlapping_tags,
    png_with_profiles,
    png_with_tags,
    repeated_scan,
    text_pixels,
    tiff_of_jpegs,
)
from convmixer.data.images import ImageSet
from convmixer.data.loader import eval_loader
from convmixer.data.sources import Files
from convmixer.data.transforms import eval_transform
from convmixer.decode import pixels, worker
from convmixer.decode.checks import check_file, check_opened, check_scans
from convmixer.preprocess import ImageError, Preprocessing, load_image, read_header


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg")).resize((160, 107))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Less than a second an image instead of ten; no process stays behind."""
    monkeypatch.setattr(pixels, "SECONDS", 0.4)
    monkeypatch.setattr(pixels, "HERE_SECONDS", 0.2)
    yield
    worker.stop_workers()


def outcome(read: Callable[[Path | bytes], object], source: Path | bytes) -> str:
    try:
        read(source)
    except ImageError as error:
        return str(error)
    return "read"


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "JPEG that repeats a scan": (repeated_scan, "scans"),
    "JPEG whose EXIF tags overlap": (lambda: jpeg_with_exif(overlapping_tags()), ""),
    "PNG of many profiles": (png_with_profiles, "more than 0.4 s"),
    "PNG whose EXIF tags overlap": (png_with_tags, ""),
    "TIFF whose tags overlap": (overlapping_tags, "more than"),
    "TIFF of JPEGs that repeat a scan": (tiff_of_jpegs, ""),
    "GIF with a long comment": (gif_comment, "more than 0.4 s"),
    "PPM as text": (text_pixels, "more than 0.4 s"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_in_seconds_and_little_memory(name: str, tmp_path: Path) -> None:
    make, reason = BOMBS[name]
    (tmp_path / "bomb").write_bytes(data := make())
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    outcome(read_header, tmp_path / "bomb")
    for source in (tmp_path / "bomb", data):
        assert reason in outcome(load_image, source)
    assert time.process_time() - start < 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 400_000  # kB


KINDS = {
    "PNG": {}, "JPEG": {}, "GIF": {}, "WEBP": {}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"}, "PPM": {},
    "JPEG2000": {}, "AVIF": {},
}  # fmt: skip


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_another_process_gives_the_same_pixels(photo: Image.Image, kind: str, in_chans: int, tmp_path: Path) -> None:
    data = encoded(photo, kind, **KINDS[kind])
    file = tmp_path / "bild-\udcff.x"  # names are bytes
    file.write_bytes(data)
    here = pixels.decode(data, in_chans, confined=True)
    for source in (data, file):
        apart = worker.image_apart(source, in_chans)
        assert apart.mode == here.mode
        np.testing.assert_array_equal(np.asarray(apart), np.asarray(here))
        assert worker.header_apart(source) == pixels.header(source, confined=True)
        np.testing.assert_array_equal(np.asarray(load_image(source, in_chans)), np.asarray(here))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_common_files_are_decoded_in_this_process(photo: Image.Image, kind: str) -> None:
    """Another process costs a fraction of a millisecond, which is much for a small image."""
    data = encoded(photo, kind, **KINDS[kind])
    check_file(io.BytesIO(data))
    check_opened(Image.open(io.BytesIO(data)))
    exif = Image.Exif()
    exif[0x0112] = 6
    for more in ({"exif": exif}, {"progressive": True}, {"quality": 95}):
        jpeg = encoded(photo, "JPEG", **more)
        check_file(io.BytesIO(jpeg))
        check_scans(jpeg, 89_000_000)


def test_a_preview_or_film_behind_a_jpeg_counts_no_scans(photo: Image.Image) -> None:
    data = encoded(photo, "JPEG") + b"\xff\xda" * 10_000
    assert load_image(data).size == photo.size


def test_heic_is_read_or_named(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(photo).save(buffer, quality=95)
    image = load_image(buffer.getvalue())
    assert float(np.abs(np.asarray(image, float) - np.asarray(photo, float)).mean()) < 4
    assert read_header(buffer.getvalue()) == ("RGB", photo.size)
    monkeypatch.setattr(pixels, "formats", lambda apart: ["PNG"])
    with pytest.raises(ImageError, match=r"HEIC image.*convmixer\[heic\]"):
        pixels.decode(buffer.getvalue(), 3, confined=True)


def test_damage_is_told_alike_from_another_process() -> None:
    with pytest.raises(ImageError, match="not an image"):
        worker.image_apart(b"hello", 3)
    assert worker._idle, "an error does not end the process"
    with pytest.raises(ImageError, match=r"/nowhere\.jp2: No such file"):
        load_image(Path("/nowhere.jp2"))


def test_a_killed_process_is_replaced(photo: Image.Image) -> None:
    data = encoded(photo, "JPEG2000")
    load_image(data)
    os.kill(worker._idle[0].process.pid, signal.SIGKILL)
    worker._idle[0].process.wait()
    assert load_image(data).size == photo.size


def test_memory_of_the_process_is_bounded(photo: Image.Image) -> None:
    code = (
        "from convmixer.decode.worker import limit_memory\n"
        "limit_memory(1 << 28)\n"
        "try: bytearray(1 << 29)\n"
        "except MemoryError: print('bounded')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sys.platform != "linux" or done.stdout == "bounded\n"


def test_no_process_outlives_its_parent(photo: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "a.jp2").write_bytes(encoded(photo, "JPEG2000"))
    code = (
        "import os, signal; from pathlib import Path; from convmixer.decode import worker\n"
        f"worker.image_apart(Path({str(tmp_path / 'a.jp2')!r}), 3); print(worker._idle[0].process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    child = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("the decoding process still runs")


def test_loaders_of_several_processes_decode_apart(photo: Image.Image, tmp_path: Path) -> None:
    for n in range(4):
        (tmp_path / f"{n}.jp2").write_bytes(encoded(photo, "JPEG2000"))
    (tmp_path / "4.ppm").write_bytes(text_pixels())
    load_image(tmp_path / "0.jp2")  # starts a process that the workers inherit
    names = np.array([f"{n}.jp2".encode() for n in range(4)] + [b"4.ppm"])
    images = ImageSet(Files(tmp_path, names), np.zeros(5), ["one"], max_bad=1)
    loader = eval_loader(images, eval_transform(Preprocessing(32)), 5, workers=2)
    assert [len(labels) for _, labels in loader] == [4]
    assert images.failed == ["4.ppm"]
