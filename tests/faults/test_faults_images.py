"""200 bad images in a real set: training, evaluation and prediction name each of them in a line, and finish."""

import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_runs import report
from PIL import Image
from sklearn.datasets import load_sample_image

from bombs import encoded, gif_comment, png_with_profiles, raw_png, repeated_scan
from convmixer.cli import main
from convmixer.decode import pixels
from convmixer.preprocess import ImageError, load_image

GOOD = 60  # of each class
BAD = 200


def crops(name: str) -> list[Image.Image]:
    """Return pieces of a real photograph."""
    photo = Image.fromarray(load_sample_image(name))
    places = [(9 * n % 560, 17 * n % 360) for n in range(GOOD + BAD)]
    return [photo.crop((left, top, left + 60, top + 60)).resize((32, 32)) for left, top in places]


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.png", b"no image")
    return buffer.getvalue()


def damages(image: Image.Image, random: random.Random) -> list[Callable[[], bytes]]:
    """Return ways to spoil an image, each of which leaves nothing to read."""

    def cut(kind: str) -> bytes:
        data = encoded(image, kind)
        return data[: random.randrange(1, len(data) * 3 // 4)]

    def overwritten() -> bytes:
        data = bytearray(encoded(image, "PNG"))
        data[60:400] = random.randbytes(340)
        return bytes(data)

    return [
        bytes, lambda: random.randbytes(500), lambda: b"GIF89a", lambda: b"<html>sorry</html>", archive, overwritten,
        lambda: raw_png(60_000, 60_000, 8, 2, b""), lambda: bytes(3000), lambda: b"\xff\xd8\xff\xe0" + bytes(500),
        lambda: cut("PNG"), lambda: cut("JPEG"), lambda: cut("WEBP"), lambda: cut("GIF"), lambda: cut("BMP"),
        lambda: cut("TIFF"), lambda: cut("JPEG2000"), lambda: cut("AVIF"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A set of two classes with bad files among the good ones, and the names of the bad ones."""
    folder, bad, chance = tmp_path_factory.mktemp("set"), set(), random.Random(0)
    bombs = [repeated_scan(1200), gif_comment(), png_with_profiles(2000)]
    for name in ("china.jpg", "flower.jpg"):
        place = folder / name[:-4]
        place.mkdir()
        for number, image in enumerate(crops(name)[: GOOD + BAD // 2]):
            if number < GOOD:
                image.save(place / f"good{number}.png")
                continue
            ways = damages(image, chance)
            data = bombs.pop() if number % 50 == 0 and bombs else ways[number % len(ways)]()
            (place / f"bad{number}.png").write_bytes(data + b"%d" % number if data else b"")
            bad.add(f"{place.name}/bad{number}.png")
    return folder, bad


@pytest.mark.slow
def test_each_bad_image_is_named_and_every_command_finishes(
    spoiled: tuple[Path, set[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, bad = spoiled
    monkeypatch.setattr(pixels, "SECONDS", 1.0)
    monkeypatch.setattr(pixels, "HERE_SECONDS", 0.3)
    unreadable = {name for name in bad if not readable(folder / name)}
    assert len(bad) == BAD
    assert len(unreadable) > 0.95 * BAD
    run = tmp_path / "run"
    settings = ["--model", "convmixer_8_1_p4_k3", "--img-size", "32", "--epochs", "1", "--batch-size", "16"]
    settings += ["--draw", "false"]
    assert main(["train", str(folder), "--out", str(run), *settings, "--max-bad-fraction", "0.9"]) == 0
    trained = "".join(capfd.readouterr())
    table = tmp_path / "predictions.jsonl"
    assert main(["predict", str(run), str(folder), "--out", str(table)]) == 0
    said = {json.loads(line)["file"]: json.loads(line) for line in table.read_text().splitlines()}
    capfd.readouterr()
    assert main(["val", str(run), str(folder)]) == 0
    measured = "".join(capfd.readouterr())
    known = (run / "record.jsonl").read_text() + trained
    names = sorted(bad)
    report("bad images, train", names, lambda n: None if n not in unreadable or str(n) in known else f"{n} not named")
    report("bad images, val", ["all"], lambda _: None if "cannot be" in measured else measured)
    report("bad images, predict", names, lambda n: wrong(said[str(folder / str(n))], n in unreadable))


def wrong(entry: dict[str, Any], unreadable: bool) -> str | None:
    """Return what is wrong with an entry of `predict`: not named, or not in one line."""
    fine = ("error" in entry) == unreadable and "\n" not in entry.get("error", "")
    return None if fine else str(entry)


def readable(file: Path) -> bool:
    try:
        load_image(file)
    except ImageError:
        return False
    return True
