"""From an image file to the model's input: the one evaluation path, for training, prediction, export and serving.

PIL and numpy only, no torch, so that an exported model predicts without it. Nothing here is random.
"""

import functools
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 89_478_485  # PIL's own limit, a quarter of a GiB as RGB; larger images are refused, not decoded
MAX_SIDE = 4096  # of a model's input, pixels; 32 images of this size take 6 GB
MAX_ASPECT = 32  # beyond this only the middle of the long side is resized: a 1 x 80,000,000 image must not blow up
# What PIL may try; leaves out formats that run other programs (EPS) or that nobody trains on.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF")
SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".jp2", ".avif",
)  # fmt: skip
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


class ImageError(ValueError):
    """The image cannot be read; the message says why, and names the file where there is one."""


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its input; saved with the weights.

    Args:
        img_size: Side of the square input, pixels.
        in_chans: 3 (RGB) or 1 (grey).
        mean: Mean per channel, of values from 0 to 1.
        std: Standard deviation per channel, of values from 0 to 1.
        interpolation: Resizing filter: "bicubic", "bilinear" or "nearest".
        crop_pct: Share of the resized image's side that the centre crop keeps, above 0, at most 1.
    """

    img_size: int
    in_chans: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))  # JSON gives lists
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if type(self.img_size) is not int or not 1 <= self.img_size <= MAX_SIDE:
            raise ValueError(f"img_size must be a whole number from 1 to {MAX_SIDE}, not {self.img_size!r:.40}")
        if type(self.in_chans) is not int or self.in_chans not in (1, 3):
            raise ValueError(f"in_chans must be 1 or 3, not {self.in_chans}")
        if not len(self.mean) == len(self.std) == self.in_chans:
            raise ValueError(f"mean {self.mean} and std {self.std} must each have {self.in_chans} values")
        if not all(math.isfinite(value) and abs(value) < 1e6 for value in self.mean):
            raise ValueError(f"mean must be finite numbers, not {self.mean}")
        if not all(1e-6 < value < 1e6 for value in self.std):
            raise ValueError(f"std must be above 0 and finite, not {self.std}")
        if self.interpolation not in FILTERS:
            raise ValueError(f"interpolation must be one of {', '.join(FILTERS)}, not {self.interpolation!r}")
        if type(self.crop_pct) not in (int, float) or not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be above 0 and at most 1, not {self.crop_pct!r:.40}")
        if self.img_size / self.crop_pct > 2 * MAX_SIDE:
            raise ValueError(f"crop_pct {self.crop_pct} is too small for {self.img_size} px")


def load_image(source: Path | bytes, in_chans: int = 3, fast_only: bool = False) -> Image.Image:
    """Return an image as 8-bit RGB or grey, upright.

    EXIF rotation is applied, transparency is laid over white, 16-bit values keep their upper byte, CMYK and palette
    are converted, and of an animation the first frame is taken. 32-bit integers count as 16-bit values (so PIL gives
    some 16-bit files), floats as 0 to 1.

    Args:
        source: A file, or the bytes of one.
        in_chans: 3 for mode RGB, 1 for mode L.
        fast_only: Take no PPM and no compressed BMP, which PIL decodes in Python, byte by byte: a server would do
            nothing else for many seconds.

    Raises:
        ImageError: Not an image, damaged, truncated, larger than MAX_PIXELS, floats that are mostly above 1, or
            32-bit integers that are all below 256.
    """
    image = _open(source, fast_only)
    try:
        with image:  # closes the file, keeps the pixels
            image.load()
            return to_mode(_upright(image), in_chans)
    except Exception as error:  # a damaged file may raise nearly anything from inside a decoder
        raise ImageError(_named(source, error)) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged notes beside sound pixels: shown as stored, as browsers do
        return image


def read_header(source: Path | bytes, fast_only: bool = False) -> tuple[str, tuple[int, int]]:
    """Return an image's mode and size (width, height) as stored, without decoding it; for `fast_only` see load_image.

    Raises:
        ImageError: Not an image, or larger than MAX_PIXELS.
    """
    with _open(source, fast_only) as image:
        return image.mode, image.size


def to_mode(image: Image.Image, in_chans: int) -> Image.Image:
    """Return a decoded image as mode RGB (in_chans 3) or L (in_chans 1), 8 bits per channel."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = _to_bytes(image)
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = _over_white(image)
    mode = "L" if in_chans == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def preprocess(image: Image.Image, p: Preprocessing) -> np.ndarray:
    """Return the model's input for one image: shorter side resized, centre cropped, normalised.

    Args:
        image: Any decoded image, see `load_image`.
        p: The model's preprocessing.

    Returns:
        float32, (C, H, W), contiguous.

    Source: the evaluation transform of timm, with the same rounding.
    """
    return normalise(resize_and_crop(to_mode(image, p.in_chans), p), p)


def resize_and_crop(image: Image.Image, p: Preprocessing) -> Image.Image:
    """Return the square of side `img_size` that the model sees."""
    image = _limit_aspect(image)
    short = math.floor(p.img_size / p.crop_pct)
    width, height = image.size
    size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    if size != image.size:
        image = image.resize(size, FILTERS[p.interpolation])
    left, top = (round((side - p.img_size) / 2) for side in size)
    if size == (p.img_size, p.img_size):
        return image
    return image.crop((left, top, left + p.img_size, top + p.img_size))


def normalise(image: Image.Image, p: Preprocessing) -> np.ndarray:
    """Return (image / 255 - mean) / std as float32, (C, H, W), contiguous."""
    values = np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)  # (C, H, W)
    std = np.array(p.std, np.float32)[:, None, None]
    offset = (np.array(p.mean, np.float32) / np.array(p.std, np.float32))[:, None, None]
    out = np.multiply(values, 1 / (255 * std), dtype=np.float32, order="C")
    out -= offset
    return out


def _open(source: Path | bytes, fast_only: bool) -> Image.Image:
    try:
        if not (source if isinstance(source, bytes) else source.stat().st_size):
            raise ImageError("the file is empty")
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats(fast_only))
    except Image.UnidentifiedImageError:
        raise ImageError(_named(source, "not an image of a known format")) from None
    except Exception as error:
        raise ImageError(_named(source, error)) from error
    if fast_only and any(tile[0] in Image.DECODERS for tile in image.tile):  # those written in Python
        image.close()
        raise ImageError(_named(source, f"this kind of {image.format} is not taken: send it as PNG"))
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise ImageError(_named(source, f"{width} x {height} pixels, more than the limit of {MAX_PIXELS:,}"))
    return image


@functools.cache
def _formats(fast_only: bool) -> list[str]:
    Image.init()  # registers what this build of PIL can read
    return [name for name in FORMATS if name in Image.OPEN and not (fast_only and name == "PPM")]


def _named(source: Path | bytes, problem: object) -> str:
    """Return the message of an error, with the file's name where there is one."""
    reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else problem
    return str(reason) if isinstance(source, bytes) else f"{source}: {reason}"


def _to_bytes(image: Image.Image) -> Image.Image:
    """Return an image of 32-bit integers (0 to 65535) or floats (0 to 1) in 8 bits; what is outside is clipped.

    The range is that of the kind, not of the one image: a pixel must not depend on the brightest one beside it.
    """
    out = np.empty((image.height, image.width), np.uint8)
    too_large = brightest = 0
    rows = max(1, 2**20 // image.width)  # at a time: several copies of all would take gigabytes
    for top in range(0, image.height, rows):
        values = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        if values.dtype.kind == "f":
            too_large += int((values > 1).sum())
            out[top : top + rows] = np.nan_to_num(values * np.float32(255)).clip(0, 255)
        else:
            out[top : top + rows] = values.clip(0, 65535) >> 8
            brightest = max(brightest, int(values.max()))
    if 2 * too_large > out.size:
        raise ImageError("most of its float values are above 1: floats go from 0 to 1, save it with 8 or 16 bits")
    if 0 < brightest < 256:
        raise ImageError("all of its 32-bit values are below 256, black as 16-bit values: save it with 8 bits")
    return Image.fromarray(out)


def _over_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _limit_aspect(image: Image.Image) -> Image.Image:
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    keep_w, keep_h = min(width, longest), min(height, longest)
    left, top = (width - keep_w) // 2, (height - keep_h) // 2
    return image.crop((left, top, left + keep_w, top + keep_h))
