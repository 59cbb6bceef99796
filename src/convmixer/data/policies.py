"""RandAugment and colour jitter for whole batches: chooses the operations of each image by its own random numbers.

A layer is one operation for each image. Operations and their strengths are those of torchvision's RandAugment and of
timm's "increasing" set, so that images follow the same distribution as on the CPU; the random numbers differ.
"""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convmixer.data import batch_ops
from convmixer.data.batch_ops import BICUBIC, BILINEAR, NEAREST

_GEOMETRY = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_ENHANCERS = ("Brightness", "Color", "Contrast", "Sharpness")
_TABLES = ("Posterize", "Solarize", "AutoContrast", "Equalize")
TORCHVISION = ("Identity", *_GEOMETRY, *_ENHANCERS, *_TABLES)
TIMM = (*_TABLES, "Invert", "SolarizeAdd", *_ENHANCERS, *_GEOMETRY)
SIGNED, GEOMETRIC = (*_GEOMETRY, *_ENHANCERS), _GEOMETRY
BLENDS = {
    "Brightness": batch_ops.brightness,
    "Color": batch_ops.color,
    "Contrast": batch_ops.contrast,
    "Sharpness": batch_ops.sharpness,
}
LEVELS = np.arange(256)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draws:
    """Random numbers of a batch: a function of (seed, epoch, index) and of the order in which they are drawn."""

    def __init__(self, seed: int, epoch: int, indices: np.ndarray) -> None:
        with np.errstate(over="ignore"):
            first = _mixed(np.array([seed & (2**64 - 1)], np.uint64)) + np.uint64(epoch) * _GOLDEN
            self._state = _mixed(_mixed(first) + indices.astype(np.uint64))
        self._count = 0

    def uniform(self) -> np.ndarray:
        """Return one number from 0 to below 1 for each image."""
        self._count += 1
        with np.errstate(over="ignore"):
            bits = _mixed(self._state + np.uint64(self._count) * _GOLDEN)
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self) -> np.ndarray:
        """Return one number with mean 0 and standard deviation 1 for each image."""
        radius = np.sqrt(-2 * np.log(1 - self.uniform()))
        return radius * np.cos(2 * np.pi * self.uniform())


def _mixed(x: np.ndarray) -> np.ndarray:
    """Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014 (SplitMix64)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


@dataclass
class Layer:
    """One operation for each image.

    Args:
        names: (B,), the operation.
        values: (B,), its strength: a factor, degrees, a share, pixels, bits or a level, see `apply`.
        sampling: (B,), of geometric operations.
    """

    names: np.ndarray
    values: np.ndarray
    sampling: np.ndarray

    def apply(self, images: Tensor, fill: Tensor) -> Tensor:
        """Return images (B, C, S, S) uint8 after the layer; `fill` (C,) is the value outside the image."""
        out = images.clone()
        for name in np.unique(self.names):
            chosen = np.flatnonzero(self.names == name)
            if name != "Identity":
                at = _on(chosen, images.device)
                out[at] = self._one(str(name), images[at], chosen, fill)
        return out

    def _one(self, name: str, images: Tensor, chosen: np.ndarray, fill: Tensor) -> Tensor:
        values = self.values[chosen]
        if name in BLENDS:
            return BLENDS[name](images, _on(values, images.device))
        if name == "AutoContrast":
            return batch_ops.look_up(images, batch_ops.autocontrast_tables(images))
        if name == "Equalize":
            return batch_ops.look_up(images, batch_ops.equalize_tables(images))
        if name in GEOMETRIC:
            matrices = _on(matrices_of(name, values, images.shape[3]), images.device)
            return batch_ops.affine(images, matrices, _on(self.sampling[chosen], images.device), fill)
        return batch_ops.look_up(images, _on(tables_of(name, values), images.device)[:, None])


def _on(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def tables_of(name: str, values: np.ndarray) -> np.ndarray:
    """Return tables uint8 (B, 256): Invert, Posterize to bits, Solarize from a level, SolarizeAdd below 128."""
    given = values[:, None]
    if name == "Invert":
        table = np.broadcast_to(255 - LEVELS, (len(values), 256))
    elif name == "Posterize":
        table = LEVELS & ~((1 << (8 - given.astype(np.int64))) - 1)
    elif name == "Solarize":
        table = np.where(given > LEVELS, LEVELS, 255 - LEVELS)
    else:
        table = np.where(LEVELS < 128, np.minimum(LEVELS + given.astype(np.int64), 255), LEVELS)
    return np.ascontiguousarray(table, np.uint8)


def matrices_of(name: str, values: np.ndarray, side: int) -> np.ndarray:
    """Return PIL's matrices float64 (B, 6): shear by a share, translate by pixels, rotate by degrees."""
    matrices = np.tile(np.array([1.0, 0, 0, 0, 1, 0]), (len(values), 1))
    if name == "Rotate":  # about the centre, as Image.rotate
        angle, center = -np.radians(values % 360), side / 2
        cos, sin = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
        matrices[:, 0], matrices[:, 1], matrices[:, 3], matrices[:, 4] = cos, sin, np.round(-np.sin(angle), 15), cos
        matrices[:, 2] = -cos * center - sin * center + center
        matrices[:, 5] = sin * center - cos * center + center
    else:
        matrices[:, {"ShearX": 1, "ShearY": 3, "TranslateX": 2, "TranslateY": 5}[name]] = values
    return matrices


def layers_of(policy: str, interpolation: str, side: int, draws: Draws) -> list[Layer]:
    """Return the layers of a policy that `supported` knows."""
    if match := re.fullmatch(r"torchvision-randaugment-(\d+)-(\d+)", policy):
        return [_torchvision(int(match[2]), side, draws) for _ in range(int(match[1]))]
    match = _timm_match(policy)
    assert match is not None
    count, strength, deviation = int(match["n"] or 2), float(match["m"]), float(match["std"] or 0)
    return [_timm(strength, deviation, interpolation, side, draws) for _ in range(count)]


def supported(policy: str) -> bool:
    """Return whether a policy's operations are implemented here: torchvision's RandAugment, and timm's with inc1."""
    torchvision = re.fullmatch(r"torchvision-randaugment-(\d+)-(\d+)", policy)
    return bool(torchvision and int(torchvision[2]) < 31) or _timm_match(policy) is not None


def _timm_match(policy: str) -> "re.Match[str] | None":
    return re.fullmatch(r"rand-m(?P<m>\d+)(?:-n(?P<n>\d+))?(?:-mstd(?P<std>[\d.]+))?-inc1", policy)


def _torchvision(magnitude: int, side: int, draws: Draws) -> Layer:
    names = np.array(TORCHVISION)[(draws.uniform() * len(TORCHVISION)).astype(int)]
    negative, share = draws.uniform() < 0.5, magnitude / 30
    strength: dict[str, float] = {
        **dict.fromkeys(("ShearX", "ShearY"), 0.3 * share),
        **dict.fromkeys(("TranslateX", "TranslateY"), float(int(150.0 / 331.0 * side * share))),
        "Rotate": 30.0 * share,
        **dict.fromkeys(BLENDS, 0.9 * share),
        "Posterize": float(8 - round(magnitude / (30 / 4))),
        "Solarize": 255.0 * (1 - share),
    }
    values = np.array([strength.get(name, 0.0) for name in names])
    values = np.where(negative & np.isin(names, SIGNED), -values, values)
    # torchvision gives translations in the opposite direction, from input to output
    values = np.where(np.isin(names, ("TranslateX", "TranslateY")), -values, values)
    values = np.where(np.isin(names, list(BLENDS)), 1 + values, values)
    return Layer(names, values, np.full(len(names), NEAREST))


def _timm(strength: float, deviation: float, interpolation: str, side: int, draws: Draws) -> Layer:
    names = np.array(TIMM)[(draws.uniform() * len(TIMM)).astype(int)]
    names = np.where(draws.uniform() > 0.5, "Identity", names)
    level = np.clip(strength + deviation * draws.normal(), 0, 10) / 10
    sign = np.where(draws.uniform() > 0.5, -1.0, 1.0)
    values = np.zeros(len(names))
    for name in np.unique(names):
        values = np.where(names == name, _timm_values(str(name), level, sign, side), values)
    smooth = np.where(draws.uniform() < 0.5, BILINEAR, BICUBIC)
    fixed = {"nearest": NEAREST, "bilinear": BILINEAR, "bicubic": BICUBIC}
    sampling = smooth if interpolation == "random" else np.full(len(names), fixed[interpolation])
    return Layer(names, values, sampling)


def _timm_values(name: str, level: np.ndarray, sign: np.ndarray, side: int) -> np.ndarray:
    if name in BLENDS:
        return np.maximum(0.1, 1 + sign * level * 0.9)
    if name in ("ShearX", "ShearY"):
        return sign * level * 0.3
    if name in ("TranslateX", "TranslateY"):
        return sign * level * 0.45 * side
    if name == "Rotate":
        return sign * level * 30
    if name == "Posterize":
        return 4 - np.trunc(level * 4)
    if name == "Solarize":
        return 256 - np.minimum(256, np.trunc(level * 256))
    return np.minimum(128, np.trunc(level * 110))  # SolarizeAdd; the others take no value


def jitter_layers(strength: float, draws: Draws) -> list[Layer]:
    """Return torchvision's ColorJitter of brightness, contrast and saturation, in random order for each image."""
    order = np.argsort(np.stack([draws.uniform() for _ in range(3)]), axis=0)
    low, high = max(0.0, 1 - strength), 1 + strength
    values = np.stack([low + (high - low) * draws.uniform() for _ in range(3)])
    names = np.array(["Brightness", "Contrast", "Color"])
    columns = np.arange(order.shape[1])
    return [Layer(names[row], values[row, columns], np.full(len(columns), NEAREST)) for row in order]


def crop_boxes(scale: tuple[float, float], ratio: tuple[float, float], side: int, draws: Draws) -> np.ndarray:
    """Return RandomResizedCrop's boxes of square images, (B, 4): top, left, height and width.

    Source: torchvision's RandomResizedCrop: ten tries, then the largest box in the middle with a ratio allowed.
    """
    found: np.ndarray | None = None
    for _ in range(10):
        area = side * side * (scale[0] + (scale[1] - scale[0]) * draws.uniform())
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = np.exp(low + (high - low) * draws.uniform())
        width, height = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
        top, left = draws.uniform(), draws.uniform()
        box = np.stack((np.floor(top * (side - height + 1)), np.floor(left * (side - width + 1)), height, width), 1)
        fits = ((width > 0) & (width <= side) & (height > 0) & (height <= side))[:, None]
        whole = np.where(fits, box, np.nan)
        found = whole if found is None else np.where(np.isnan(found), whole, found)
    assert found is not None
    wide = round(side * ratio[1]) if ratio[1] < 1 else side
    high = round(side / ratio[0]) if ratio[0] > 1 else side
    middle = np.array([(side - high) // 2, (side - wide) // 2, high, wide], np.float64)
    return np.where(np.isnan(found), middle, found)
