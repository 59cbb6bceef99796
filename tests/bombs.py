"""Small files that make an image decoder work for long or take much memory."""

import io
import struct
import zlib

from PIL import Image


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, bits: int, colour: int, pixels: bytes, before: bytes = b"") -> bytes:
    """Return a PNG file from its parts; PIL cannot write all that it reads."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = before + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def repeated_scan(side: int = 4000, size: int = 200_000) -> bytes:
    """Return a progressive JPEG of about `size` bytes, whose last scan comes again and again."""
    jpeg = encoded(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    last, end = jpeg.rindex(b"\xff\xda"), jpeg.rindex(b"\xff\xd9")
    return jpeg[:end] + jpeg[last:end] * max(1, (size - len(jpeg)) // (end - last)) + jpeg[end:]


def overlapping_tags(tags: int = 65_535, size: int = 1_000_000) -> bytes:
    """Return TIFF tags that all have the same `size` bytes for their value."""
    entries = b"".join(struct.pack("<HHII", tag, 1, size, 8) for tag in range(tags))
    return b"II*\0" + struct.pack("<IH", 8, tags) + entries + bytes(4 + max(0, size - len(entries)))


def jpeg_with_exif(tiff: bytes) -> bytes:
    """Return a JPEG with EXIF of any size, in as many segments as it takes."""
    jpeg = encoded(Image.new("RGB", (8, 8)), "JPEG")
    parts = [tiff[i : i + 65_000] for i in range(0, len(tiff), 65_000)]
    segments = [b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts]
    app0 = 4 + int.from_bytes(jpeg[4:6], "big")  # JFIF: it has a density, and so hides the way through EXIF
    return jpeg[:2] + b"".join(segments) + jpeg[app0:]


def png_with_profiles(count: int = 10_000) -> bytes:
    """Return a PNG with many colour profiles of a megabyte each, packed a thousand times."""
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(1_000_000), 9))
    return raw_png(1, 1, 8, 0, b"\0\0", profile * count)


def png_with_tags() -> bytes:
    """Return a PNG whose EXIF, behind the pixels, is `overlapping_tags`."""
    png = raw_png(1, 1, 8, 0, b"\0\0")
    return png[:-12] + chunk(b"eXIf", overlapping_tags()) + png[-12:]


def gif_comment(size: int = 8_000_000) -> bytes:
    """Return a GIF with a long comment, which PIL puts together piece by piece, copying all of it each time."""
    gif = encoded(Image.new("P", (4, 4)), "GIF")
    start = gif.index(b"\x2c")
    return gif[:start] + b"!\xfe" + b"\xff".ljust(256, b"x") * (size // 256) + b"\0" + gif[start:]


def text_pixels(side: int = 2500) -> bytes:
    """Return a PPM whose pixels are text, which PIL decodes in Python."""
    return b"P3\n%d %d\n255\n" % (side, side) + b"7 " * (3 * side * side)


def tiff_of_jpegs() -> bytes:
    """Return a TIFF whose strips are all the same JPEG with a repeated scan."""
    strip = repeated_scan(2048, 300_000)
    rows, count = 2048, 16
    values = {256: (4, 1, 2048), 257: (4, 1, rows * count), 258: (3, 3, 0), 259: (3, 1, 7), 262: (3, 1, 6)}
    values |= {273: (4, count, 0), 277: (3, 1, 3), 278: (4, 1, rows), 279: (4, count, 0)}
    after = 8 + 2 + 12 * len(values) + 4
    places = {258: after, 273: after + 6, 279: after + 6 + 4 * count}
    data = after + 6 + 8 * count
    entries = b"".join(struct.pack("<HHII", t, k, n, places.get(t, v)) for t, (k, n, v) in sorted(values.items()))
    tail = struct.pack("<3H", 8, 8, 8) + struct.pack(f"<{count}I", *[data] * count)
    tail += struct.pack(f"<{count}I", *[len(strip)] * count)
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4) + tail + strip
