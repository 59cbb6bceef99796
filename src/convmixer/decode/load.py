"""An image file to upright 8-bit pixels, whatever the file holds, in at most `pixels.SECONDS` of computing time.

Most files are decoded here; those that could run for long or take much memory, in a process that can be killed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from convmixer.decode.errors import Apart, named
from convmixer.decode.pixels import Header, decode, header
from convmixer.decode.worker import header_apart, image_apart


def load_image(source: Path | bytes, in_chans: int = 3) -> Image.Image:
    """Return an image as 8-bit RGB or grey, upright.

    EXIF rotation is applied, transparency is laid over white, 16-bit values keep their upper byte, CMYK and palette
    are converted, and an animation gives its first frame. 32-bit integers count as 16-bit values (PIL reads some
    16-bit files so), floats as 0 to 1.

    Args:
        source: A file, or the bytes of one.
        in_chans: 3 for mode RGB, 1 for mode L.

    Raises:
        ImageError: Not an image, damaged, truncated, larger than MAX_PIXELS, too slow to decode, floats that are
            mostly above 1, or 32-bit integers that are all below 256.
    """
    return _here_or_apart(source, decode, image_apart, in_chans)


def read_header(source: Path | bytes) -> Header:
    """Return an image's mode and size (width, height) as stored, without decoding it.

    Raises:
        ImageError: Not an image, or larger than MAX_PIXELS.
    """
    return _here_or_apart(source, header, header_apart)


def _here_or_apart(source: Path | bytes, here: Callable[..., Any], apart: Callable[..., Any], *args: Any) -> Any:
    try:
        try:
            return here(source, *args, trusted=False)
        except Apart:
            return apart(source, *args)
    except Exception as error:  # a damaged file may raise nearly anything from inside a decoder
        raise named(source, error) from error
