"""Turns an image into the model's input, in the same way for evaluation, prediction, export and serving.

It uses only PIL and numpy, so an exported model can predict without torch. Nothing here is random.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from convmixer.decode.errors import ImageError
from convmixer.decode.load import load_image, read_header
from convmixer.decode.pixels import SUFFIXES, to_mode

__all__ = [
    "FILTERS", "IMAGENET_MEAN", "IMAGENET_STD", "SUFFIXES", "ImageError", "Preprocessing", "load_image", "normalise",
    "preprocess", "read_header", "resize_and_crop", "to_mode",
]  # fmt: skip

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BITS = (8, 10, 12, 14, 16)  # bits per value that cameras and scanners use in 16-bit files
MAX_SIDE = 4096  # largest width and height of a model's input, pixels; 32 images of this size take 6 GB
MAX_ASPECT = 32  # of longer images only the middle is resized; a whole image of 1 x 80,000,000 would fill the memory
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input; saved with the weights.

    Args:
        img_size: Width and height of the input, pixels.
        in_chans: 3 (RGB) or 1 (grey).
        mean: Mean per channel, of values from 0 to 1.
        std: Standard deviation per channel, of values from 0 to 1.
        interpolation: Resizing filter: "bicubic", "bilinear" or "nearest".
        crop_pct: Side of the centre crop divided by the shorter side of the resized image, in (0, 1].
        bits: How many bits the values of 16-bit and 32-bit integer images use: 8, 10, 12, 14 or 16.
    """

    img_size: int
    in_chans: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    bits: int = 16

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
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, not {self.bits!r:.40}")
        if self.img_size / self.crop_pct > 2 * MAX_SIDE:
            raise ValueError(f"crop_pct {self.crop_pct} is too small for {self.img_size} px")


def preprocess(image: Image.Image, p: Preprocessing) -> np.ndarray:
    """Return the model's input for one image: shorter side resized, centre cropped, normalised.

    Args:
        image: Any decoded image, see `load_image`.
        p: The model's preprocessing.

    Returns:
        float32, (C, H, W), contiguous.

    Source: the evaluation transform of timm, with the same rounding.
    """
    return normalise(resize_and_crop(to_mode(image, p.in_chans, p.bits), p), p)


def resize_and_crop(image: Image.Image, p: Preprocessing) -> Image.Image:
    """Return the image resized and cropped to `img_size` x `img_size`, as the model gets it."""
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


def _limit_aspect(image: Image.Image) -> Image.Image:
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    keep_w, keep_h = min(width, longest), min(height, longest)
    left, top = (width - keep_w) // 2, (height - keep_h) // 2
    return image.crop((left, top, left + keep_w, top + keep_h))
