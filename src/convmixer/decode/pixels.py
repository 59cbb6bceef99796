"""Decodes an image file to upright 8-bit pixels, in this process.

The CPU time is checked each time PIL reads a block of the file. `checks` finds the files for which this is not
enough; `worker` decodes those in another process.
"""

import functools
import io
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from convmixer.decode import checks
from convmixer.decode.errors import Apart, ImageError

MAX_PIXELS = 89_478_485  # PIL's own limit, a quarter of a GiB as RGB; larger images are refused
SECONDS = 10.0  # CPU time allowed to decode one image
HERE_SECONDS = 2.0  # after this CPU time, the image is decoded again from the start in another process
# The formats that PIL may try, without those that run other programs (EPS) or that nobody trains on.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF", "HEIF")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".jp2", ".avif", ".heic", ".heif",
)  # fmt: skip

_ORIENTATION = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}  # where PIL looks for the tag

Header = tuple[str, tuple[int, int]]


def decode(source: Path | bytes, in_chans: int, bits: int = 16, *, confined: bool) -> Image.Image:
    """Return an image as 8-bit RGB (in_chans 3) or grey (1), upright.

    Args:
        source: A file, or the bytes of one.
        in_chans: 3 or 1.
        bits: See `to_mode`.
        confined: Decode the image here in any case, because another process limits this one.

    Raises:
        Apart: The image should be decoded in another process; only raised if `confined` is False.
        Exception: The image cannot be read; damaged files raise nearly any error from inside a decoder.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    file = _Bytes(data, confined) if checks.needs_clock(data) else io.BytesIO(data)
    with _open(file, confined, len(data) <= checks.METADATA_BYTES) as image:
        if image.format in checks.JPEG:
            checks.check_scans(data, image.width * image.height)
        elif not confined:
            checks.check_opened(image)
        image.load()
        if not confined and image.format not in checks.JPEG:
            checks.check_metadata(image)
        return to_mode(_upright(image), in_chans, bits)


def peak(source: Path | bytes, confined: bool) -> int:
    """Return the largest value of an image of 16-bit or 32-bit integers; 0 for other images.

    Arguments and errors are those of `decode`.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    file = _Bytes(data, confined) if checks.needs_clock(data) else io.BytesIO(data)
    with _open(file, confined, len(data) <= checks.METADATA_BYTES) as image:
        if not image.mode.startswith("I"):
            return 0
        if not confined:
            checks.check_opened(image)
        image.load()
        return int(np.asarray(image).max())


def header(source: Path | bytes, confined: bool) -> Header:
    """Return an image's mode and size as stored; arguments and errors are those of `decode`."""
    with (
        _Bytes(source, confined) if isinstance(source, bytes) else _File(io.FileIO(source), confined) as file,
        _open(file, confined) as image,
    ):
        return image.mode, image.size


def _open(file: BinaryIO, confined: bool, small: bool = False) -> Image.Image:
    if not file.read(1):
        raise ImageError("the file is empty")
    file.seek(0)
    if not confined:
        checks.check_file(file, small)
    try:
        image = Image.open(file, formats=formats(confined))
    except Image.UnidentifiedImageError:
        raise ImageError(_unknown(file)) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels, more than the limit of {MAX_PIXELS:,}")
    return image


class _Clock:
    """A file whose reads fail once this thread has used its CPU time for the image.

    If confined, they raise ImageError after `SECONDS`, else Apart after `HERE_SECONDS`. CPU time counts, not wall
    time: whether an image can be read must not depend on the load of the machine.

    Args:
        content: The file.
        confined: See `decode`.
    """

    def __init__(self, content: Any, confined: bool) -> None:
        super().__init__(content)  # type: ignore[call-arg]
        self._confined, self._seconds = confined, SECONDS if confined else HERE_SECONDS
        self._look_at = time.monotonic() + self._seconds  # the CPU time cannot be used up before this
        self._start = time.thread_time()

    def read(self, size: int | None = -1, /) -> bytes:
        if time.monotonic() > self._look_at:
            left = self._seconds - (time.thread_time() - self._start)
            if left <= 0:
                raise ImageError(too_slow()) if self._confined else Apart
            self._look_at = time.monotonic() + left
        return super().read(size)  # type: ignore[misc]


class _Bytes(_Clock, io.BytesIO):
    """A file in memory."""


class _File(_Clock, io.BufferedReader):
    """A file on disk."""


def too_slow() -> str:
    """Return the message for an image that takes too long."""
    return f"it takes more than {SECONDS:g} s to decode: save it again as plain JPEG or PNG"


@functools.cache
def formats(apart: bool) -> list[str]:
    """Return PIL's names of the formats that are read.

    HEIC is read only in a process that can be killed (`apart`).
    """
    Image.init()  # registers what this build of PIL can read
    if not apart:
        return [name for name in FORMATS if name in Image.OPEN and name != "HEIF"]
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ImportError:  # an extra
        pass
    return [name for name in FORMATS if name in Image.OPEN]


def _unknown(file: BinaryIO) -> str:
    """Return the message for a file that no decoder reads."""
    file.seek(0)
    start = file.read(12)
    if start[4:8] == b"ftyp" and start[8:] in HEIC_BRANDS and "HEIF" not in formats(True):
        return "a HEIC image, which needs another package: pip install 'convmixer[heic]', or save it as JPEG"
    return "not an image of a known format"


def _upright(image: Image.Image) -> Image.Image:
    if image.format in ("PNG", "JPEG") and not _ORIENTATION & image.info.keys():
        return image  # PIL would look for the tags, then copy the image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the metadata are damaged, the pixels are not: do not rotate, as browsers do
        return image


def to_mode(image: Image.Image, in_chans: int, bits: int = 16) -> Image.Image:
    """Return a decoded image as mode RGB (in_chans 3) or L (in_chans 1), 8 bits per channel.

    Args:
        image: A decoded image of any mode.
        in_chans: 3 or 1.
        bits: How many bits the values of 16-bit and 32-bit integers use, 8 to 16; the upper 8 of them are kept.

    Raises:
        ImageError: More than 1% of the values are above the largest that `bits` can hold, or the values cannot be
            scaled.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray(_upper_byte(np.asarray(image).astype(np.uint16), bits))
    elif image.mode == "I" and bits < 16:
        image = Image.fromarray(_upper_byte(np.asarray(image), bits))
    elif image.mode in ("I", "F"):
        image = _to_bytes(image)
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = _over_white(image)
    mode = "L" if in_chans == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _upper_byte(values: np.ndarray, bits: int) -> np.ndarray:
    """Return the upper 8 bits of integers that use `bits` bits."""
    if bits < 16 and 100 * np.count_nonzero(values >= 1 << bits) > values.size:
        raise ImageError(f"its values go up to {values.max()}, but {bits}-bit images have at most {(1 << bits) - 1}")
    return (values.clip(0, (1 << bits) - 1) >> (bits - 8)).astype(np.uint8)


def _to_bytes(image: Image.Image) -> Image.Image:
    """Return an image of 32-bit integers (0 to 65535) or floats (0 to 1) in 8 bits; values outside are clipped.

    The range is the same for all images, because a pixel must not depend on the brightest pixel of its image.
    """
    out = np.empty((image.height, image.width), np.uint8)
    too_large = brightest = 0
    rows = max(1, 2**20 // image.width)  # rows converted at once; copies of the whole image would take gigabytes
    for top in range(0, image.height, rows):
        values = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        if values.dtype.kind == "f":
            too_large += int((values > 1).sum())
            out[top : top + rows] = np.nan_to_num(values * np.float32(255)).clip(0, 255)
        else:
            out[top : top + rows] = values.clip(0, 65535) >> 8
            brightest = max(brightest, int(values.max()))
    if 2 * too_large > out.size:
        raise ImageError("most of its float values are above 1: floats go from 0 to 1; save it with 8 or 16 bits")
    if 0 < brightest < 256:
        raise ImageError("all of its 32-bit values are below 256, so it would be black: save it with 8 bits")
    return Image.fromarray(out)


def _over_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
