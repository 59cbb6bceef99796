"""The evaluation path: every kind of file gives the right pixels or one clear error; timm agrees."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from timm.data import create_transform

from convmixer.decode import pixels as module
from convmixer.preprocess import ImageError, Preprocessing, load_image, preprocess


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg")).resize((160, 107))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def distance(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize(("size", "crop_pct"), [(96, 1.0), (96, 0.875), (224, 0.96)])
@pytest.mark.parametrize("turn", [False, True])
def test_equals_timm(photo: Image.Image, interpolation: str, size: int, crop_pct: float, turn: bool) -> None:
    image = photo.transpose(Image.Transpose.ROTATE_90) if turn else photo
    timm = create_transform(size, interpolation=interpolation, crop_pct=crop_pct)
    ours = preprocess(image, Preprocessing(size, interpolation=interpolation, crop_pct=crop_pct))
    assert ours.shape == (3, size, size)
    assert ours.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(ours), timm(image), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("PPM", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95}, 3),
        ("JPEG", {"quality": 95, "progressive": True}, 3),
        ("GIF", {}, 10),
    ],
)
def test_formats(photo: Image.Image, kind: str, options: dict[str, object], tolerance: float) -> None:
    image = load_image(encoded(photo, kind, **options))
    assert image.mode == "RGB"
    assert distance(image, photo) <= tolerance


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B", "I", "F"])
def test_modes(photo: Image.Image, mode: str, in_chans: int) -> None:
    grey = photo.convert("L")
    values = np.asarray(grey)
    special = {
        "I;16": values.astype(np.uint16) * 257,
        "I;16B": (values.astype(np.uint16) * 257).astype(">u2"),
        "I": values.astype(np.int32) * 257,
        "F": values / np.float32(255),
    }
    colour = photo.quantize(256) if mode == "P" else photo.convert(mode) if mode not in special else None
    image = colour or Image.fromarray(special[mode])
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG", "I": "TIFF", "I;16B": "TIFF", "F": "TIFF"}.get(mode, "PNG")
    result = load_image(encoded(image, kind, **({"quality": 98} if kind == "JPEG" else {})), in_chans)
    wanted = photo if mode in ("P", "RGB", "RGBA", "CMYK", "YCbCr") and in_chans == 3 else grey
    assert result.mode == ("L" if in_chans == 1 else "RGB")
    assert distance(result, wanted.convert(result.mode)) < (
        90 if mode == "1" else 8 if mode == "P" else 3
    )  # 1: dithered


@pytest.mark.parametrize("brightest", [255, 256, 65535, 2**30])
def test_a_pixel_does_not_depend_on_the_brightest_one(brightest: int) -> None:
    integers = np.full((4, 4), 100 * 256 + 5, np.int32)
    integers[0, 0] = brightest
    seen = np.asarray(load_image(encoded(Image.fromarray(integers), "TIFF"), 1))
    assert seen[1, 1] == 100
    assert seen[0, 0] == min(brightest, 65535) >> 8
    floats = np.full((4, 4), 0.5, np.float32)
    floats[0] = -1, np.nan, 1, brightest
    seen = np.asarray(load_image(encoded(Image.fromarray(floats), "TIFF"), 1))
    assert seen[1, 1] == 127
    assert seen[0].tolist() == [0, 0, 255, 255]


def test_floats_to_255_are_refused() -> None:
    data = encoded(Image.fromarray(np.full((4, 4), 128, np.float32)), "TIFF")
    with pytest.raises(ImageError, match="floats go from 0 to 1"):
        load_image(data)


def test_32_bit_integers_to_255_are_refused() -> None:
    """They would be black as 16-bit values, and may be meant as 8-bit ones; a black image stays black."""
    with pytest.raises(ImageError, match="below 256"):
        load_image(encoded(Image.fromarray(np.full((4, 4), 200, np.int32)), "TIFF"))
    black = load_image(encoded(Image.fromarray(np.zeros((4, 4), np.int32)), "TIFF"), 1)
    assert not np.asarray(black).any()


def test_exif_rotation_is_applied(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 270 degrees
    image = load_image(encoded(photo, "JPEG", exif=exif, quality=95))
    assert distance(image, photo.transpose(Image.Transpose.ROTATE_270)) < 3


def test_damaged_exif_beside_sound_pixels_is_passed_over(photo: Image.Image) -> None:
    for kind, exif in (("PNG", b"Exif\0\0nothing"), ("WEBP", b"Exif\0\0nothing")):
        data = encoded(photo, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
        with pytest.raises(SyntaxError):
            ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert distance(load_image(data), photo) == 0


def test_transparency_is_laid_over_white(photo: Image.Image) -> None:
    image = photo.convert("RGBA")
    image.putalpha(0)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    for data in (encoded(image, "PNG"), encoded(palette, "PNG", transparency=0)):
        assert np.asarray(load_image(data)).min() == 255


def test_an_animation_gives_its_first_frame(photo: Image.Image) -> None:
    data = encoded(photo.quantize(256), "GIF", save_all=True, append_images=[Image.new("P", photo.size)] * 3)
    assert distance(load_image(data), photo) < 10


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, bits: int, colour: int, pixels: bytes) -> bytes:
    """Return a PNG file from its parts; PIL cannot write all that it reads."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data


def test_sixteen_bit_colour_png(photo: Image.Image) -> None:
    values = np.asarray(photo).astype(">u2") * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    assert distance(load_image(raw_png(*photo.size, 16, 2, rows)), photo) == 0


def bomb() -> bytes:
    """Return a PNG of a few bytes that says it has 40,000 x 40,000 pixels."""
    return raw_png(40_000, 40_000, 8, 0, b"0")


def test_damaged_files_are_named(photo: Image.Image, tmp_path: Path) -> None:
    jpeg, png = encoded(photo, "JPEG"), encoded(photo, "PNG")
    damaged = {
        "empty": (b"", "empty"),
        "text": (b"this is no image\n" * 9, "not an image"),
        "cut-jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut-png": (png[: len(png) // 2], "truncated|broken"),
        "flipped-png": (png[:90] + bytes(200) + png[290:], "broken|decompress|checksum|corrupt|bad"),
        "header-only": (jpeg[:20], "not an image|truncated"),
        "bomb": (bomb(), "pixels"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    }
    for name, (data, reason) in damaged.items():
        file = tmp_path / f"{name}.jpg"
        file.write_bytes(data)
        with pytest.raises(ImageError, match=rf"{name}\.jpg: .*({reason})"):
            load_image(file)
        with pytest.raises(ImageError, match=reason):
            load_image(data)
    with pytest.raises(ImageError, match=r"missing\.jpg: No such file"):
        load_image(tmp_path / "missing.jpg")


def test_just_too_many_pixels(monkeypatch: pytest.MonkeyPatch, photo: Image.Image) -> None:
    data = encoded(photo, "PNG")
    monkeypatch.setattr(module, "MAX_PIXELS", photo.width * photo.height)
    load_image(data)
    monkeypatch.setattr(module, "MAX_PIXELS", photo.width * photo.height - 1)
    with pytest.raises(ImageError, match="160 x 107 pixels"):
        load_image(data)


def test_extreme_aspect_stays_small() -> None:
    ramp = Image.fromarray(np.linspace(0, 255, 2_000_000).astype(np.uint8)[None])  # 1 pixel high
    result = preprocess(ramp, Preprocessing(64, 1, (0.0,), (1.0,)))
    assert result.shape == (1, 64, 64)
    assert abs(result.mean() - 0.5) < 0.01  # the middle of the ramp


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"img_size": 0}, "img_size must be"),
        ({"in_chans": 2}, "in_chans must be 1 or 3"),
        ({"in_chans": 1}, "must each have 1 values"),
        ({"std": (0, 1, 1)}, "std must be above 0"),
        ({"interpolation": "cubic"}, "interpolation must be one of"),
        ({"crop_pct": 0}, "crop_pct must be"),
    ],
)
def test_wrong_preprocessing_is_refused(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Preprocessing(**{"img_size": 32, **values})  # type: ignore[arg-type]


def test_lists_from_json_become_tuples() -> None:
    assert Preprocessing(8, 1, [0.5], [0.25]) == Preprocessing(8, 1, (0.5,), (0.25,))  # type: ignore[arg-type]
