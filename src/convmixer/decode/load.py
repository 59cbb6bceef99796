"""Decodes any image file to upright 8-bit pixels, in at most `pixels.SECONDS` of CPU time.

Most files are decoded in this process. Files that could take long or much memory are decoded in another process,
which can be killed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from convmixer.decode.errors import Apart, named
from convmixer.decode.pixels import Header, decode, header, peak
from convmixer.decode.worker import header_apart, image_apart, peak_apart


def load_image(source: Path | bytes, in_chans: int = 3, bits: int = 16, apart: bool = True) -> Image.Image:
    """Return an image as 8-bit RGB or grey, upright.

    EXIF rotation is applied, transparent images are put on white, and CMYK and palette images are converted. The
    first frame of an animation is used. Of 16-bit values, the upper 8 of the bits in use are kept. 32-bit integers
    are taken as 16-bit values, because PIL reads some 16-bit files that way. Floats are expected in the range 0 to 1.

    Args:
        source: A file, or the bytes of one.
        in_chans: 3 for mode RGB, 1 for mode L.
        bits: How many bits the values of 16-bit and 32-bit integers use: 8, 10, 12, 14 or 16; see `brightest`.
        apart: Whether images that may take long are decoded in another process; if False, Apart is raised for them.

    Raises:
        Apart: Decoding may take long, and `apart` is False.
        ImageError: The file is no image, damaged, truncated, larger than MAX_PIXELS or too slow to decode; or its
            values do not fit: floats mostly above 1; 32-bit integers all below 256 although `bits` is 16; more than
            1% of the values above the largest that `bits` can hold.
    """
    return _here_or_apart(source, decode, image_apart if apart else None, in_chans, bits)


def brightest(source: Path | bytes) -> int:
    """Return the largest value of an image of 16-bit or 32-bit integers; 0 for other images and unreadable ones."""
    try:
        peaks: int = _here_or_apart(source, peak, peak_apart)
    except Exception:  # a damaged file is reported when it is decoded
        return 0
    return peaks


def read_header(source: Path | bytes, apart: bool = True) -> Header:
    """Return an image's mode and size (width, height) as stored, without decoding it; for `apart` see `load_image`.

    Raises:
        Apart: Reading may take long, and `apart` is False.
        ImageError: The file is not an image, or is larger than MAX_PIXELS.
    """
    return _here_or_apart(source, header, header_apart if apart else None)


def _here_or_apart(
    source: Path | bytes, here: Callable[..., Any], apart: Callable[..., Any] | None, *args: Any
) -> Any:
    try:
        try:
            return here(source, *args, confined=False)
        except Apart:
            if apart is None:
                raise
            return apart(source, *args)
    except Apart:
        raise
    except Exception as error:  # a damaged file may raise nearly anything from inside a decoder
        raise named(source, error) from error
