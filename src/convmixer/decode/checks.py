"""Estimates from a file's structure how long its decoding may take, before PIL decodes it.

PIL and its libraries limit the number of pixels, but not the work per pixel. A progressive JPEG may repeat a scan
thousands of times, all EXIF tags may point to the same megabyte, and all strips of a TIFF may be the same large one.
"""

import re
import struct
from typing import BinaryIO

import numpy as np
from PIL import Image

from convmixer.decode.errors import Apart, ImageError

MAX_SCANS = 200  # scans of a JPEG; encoders write 1 to 20
MAX_SCAN_PIXELS = 4_000_000_000  # scans times pixels of a JPEG; an empty scan takes 0.5 ns per pixel
SCAN_BYTES = 10  # length of the shortest scan
METADATA_BYTES = 65_536  # EXIF of a JPEG, or all data before the pixels of a PNG; PIL copies EXIF once per tag
GIF_BYTES = 1 << 20
UNWATCHED_PIXELS = 4_000_000  # limit for formats decoded in one call, during which the clock cannot be checked
JPEG = ("JPEG", "MPO")
_JPEG_START = b"\xff\xd8\xff"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_TIFF_STARTS = (b"II*\0", b"MM\0*")
_APART = (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")  # JPEG 2000, always decoded apart
# TIFF tags that describe one plain image of strips, and those of GeoTIFF and GDAL
_TIFF_TAGS = {254, 256, 257, 258, 259, 262, 269, 270, 271, 272, 273, 274, 277, 278, 279, 280, 281, 282, 283, 284}
_TIFF_TAGS |= {285, 296, 305, 306, 315, 316, 317, 320, 338, 339, 33432, 33550, 33922, 34735, 34736, 34737}
_TIFF_TAGS |= {42112, 42113}
_TIFF_CODECS = (1, 5, 8, 32773, 32946)  # none, LZW, deflate, PackBits
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # bytes of a value, by type
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # 0xFF and a marker, but no stuffed, restart or fill byte


def needs_clock(data: bytes) -> bool:
    """Return whether a clock must run while a file is read.

    Small files do not need it, nor do JPEG files, whose work `check_scans` limits.
    """
    return len(data) > METADATA_BYTES and not data.startswith(_JPEG_START)


def check_file(file: BinaryIO, small: bool = False) -> None:
    """Check a file before PIL opens it; afterwards its position is at the start again.

    Args:
        file: The file, at its start.
        small: Whether it has at most METADATA_BYTES.

    Raises:
        Apart: The file should be decoded in a process that can be killed.
    """
    start = file.read(16)
    if small and start.startswith((_JPEG_START, _PNG_START)):
        apart = False
    elif start.startswith(_JPEG_START):
        apart = _jpeg_exif_bytes(file) > METADATA_BYTES
    elif start.startswith(_PNG_START):
        apart = _png_metadata_bytes(file) > METADATA_BYTES
    elif start.startswith(_TIFF_STARTS):
        apart = not _is_plain_tiff(file, start)
    elif start.startswith(b"GIF8"):  # PIL joins comments piece by piece while holding the GIL
        apart = file.seek(0, 2) > GIF_BYTES
    else:
        apart = start[4:8] == b"ftyp" or start.startswith(_APART)
    file.seek(0)
    if apart:
        raise Apart


def check_opened(image: Image.Image) -> None:
    """Check an image that PIL has opened (not a JPEG) before its pixels are decoded.

    Raises:
        Apart: The image should be decoded in a process that can be killed.
    """
    if image.format == "PNG":  # decoded in pieces
        return
    in_python = any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ()))
    if in_python or image.width * image.height > UNWATCHED_PIXELS:
        raise Apart


def check_metadata(image: Image.Image) -> None:
    """Check an image's EXIF before PIL reads it.

    Raises:
        Apart: The EXIF is large: PIL may copy all of it once for each of thousands of tags.
    """
    info = image.info
    if len(info.get("exif") or ()) > METADATA_BYTES or len(info.get("Raw profile type exif") or ()) > METADATA_BYTES:
        raise Apart


def check_scans(data: bytes, pixels: int) -> None:
    """Check that a JPEG does not have too many scans, each of which goes over all pixels.

    Raises:
        ImageError: It has too many scans for its size.
    """
    if len(data) // SCAN_BYTES * pixels <= MAX_SCAN_PIXELS:
        return
    most = min(MAX_SCANS, MAX_SCAN_PIXELS // max(pixels, 1))
    values = np.frombuffer(data, np.uint8)
    markers = np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == 0xDA))  # bytes.count takes ten times as long
    if markers > most and _scans(data, most) > most:
        raise ImageError(f"it has more than {most} scans, so decoding would take long: save it again as plain JPEG")


def _scans(data: bytes, most: int) -> int:
    """Return the number of scans of the first image in a JPEG file; counting stops above `most`."""
    place, scans = 2, 0
    while scans <= most and (found := _MARKER.search(data, place)):
        marker, place = found[0][1], found.end()
        if marker == 0xD9:  # the image ends; a preview or a video may follow
            break
        scans += marker == 0xDA
        if marker not in (0x01, 0xD8):  # the other markers give their length
            place += int.from_bytes(data[place : place + 2], "big")
    return scans


def _jpeg_exif_bytes(file: BinaryIO) -> int:
    """Return the size of all EXIF before a JPEG's pixels, in bytes."""
    total, place = 0, 2
    while True:
        file.seek(place)
        head = file.read(10)
        if len(head) < 4 or head[0] != 0xFF or head[1] in (0xDA, 0xD9):
            return total
        if head[1] == 0xFF:  # a fill byte
            place += 1
            continue
        size = int.from_bytes(head[2:4], "big")
        if head[1] == 0xE1 and head[4:8] == b"Exif":
            total += size
        place += 2 + size


def _png_metadata_bytes(file: BinaryIO) -> int:
    """Return the size of everything before a PNG's pixels in bytes, plus 64 for each chunk."""
    total, place = 0, 8
    while total <= METADATA_BYTES:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IDAT":
            break
        size = int.from_bytes(head[:4], "big")
        total += size + 64
        place += size + 12
    return total


def _is_plain_tiff(file: BinaryIO, start: bytes) -> bool:
    """Return whether a TIFF holds one image in strips, compressed by a common codec, and only small, known tags."""
    order = "<" if start[:2] == b"II" else ">"
    file.seek(struct.unpack(f"{order}I", start[4:8])[0])
    count = file.read(2)
    if len(count) < 2:
        return True  # truncated: PIL reports it
    tags = file.read(12 * struct.unpack(f"{order}H", count)[0])
    for place in range(0, len(tags) - 11, 12):
        tag, kind, values = struct.unpack_from(f"{order}HHI", tags, place)
        if tag not in _TIFF_TAGS or values * _TIFF_SIZES.get(kind, 1) > METADATA_BYTES // 8:
            return False
        codec = struct.unpack_from(f"{order}H", tags, place + 8)[0]
        if tag == 259 and codec not in _TIFF_CODECS:
            return False
    return True
