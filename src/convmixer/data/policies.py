"""RandAugment and colour jitter for whole batches: chooses the operations of each image by its own random numbers.

A layer applies one operation to each image. All random choices of a batch are numbers in one array, so a GPU gets
them in one copy. Operations and strengths are those of torchvision's RandAugment and of timm's "increasing" set, so
images follow the same distribution as on the CPU; the random numbers differ.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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
_OF_VALUES = {
    "Posterize": batch_ops.posterize_tables,
    "Solarize": batch_ops.solarize_tables,
    "Invert": batch_ops.invert_tables,
    "SolarizeAdd": batch_ops.solarize_add_tables,
}
_OF_IMAGES = {"AutoContrast": batch_ops.autocontrast_tables, "Equalize": batch_ops.equalize_tables}
NUMBERS = {name: number for number, name in enumerate(("Identity", *_GEOMETRY, *BLENDS, *_OF_VALUES, *_OF_IMAGES))}
LAYER_COLUMNS = 9  # a layer's operation, value, sampling and matrix
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
    """Return a hash of each number, by SplitMix64.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


@dataclass
class Layer:
    """One operation for each image.

    Args:
        operations: (B,), number of the operation for each image, see `NUMBERS`.
        values: (B,), strength of the operation. Its unit depends on the operation: a factor, degrees, a share,
            pixels, bits or a grey level.
        sampling: (B,), interpolation of geometric operations.
        kind: The operations and interpolations that may occur in the layer.
    """

    operations: np.ndarray
    values: np.ndarray
    sampling: np.ndarray
    kind: "Kind"

    def numbers(self, side: int) -> np.ndarray:
        """Return the layer as numbers for `Kind.apply`, float64 (B, `LAYER_COLUMNS`).

        Args:
            side: Width and height of the images, pixels.
        """
        matrices = np.tile(np.array([1.0, 0, 0, 0, 1, 0]), (len(self.values), 1))
        for name in GEOMETRIC:
            here = np.flatnonzero(self.operations == NUMBERS[name])
            if len(here):
                matrices[here] = matrices_of(name, self.values[here], side)
        return np.column_stack((self.operations, self.values, self.sampling, matrices))


@dataclass(frozen=True)
class Kind:
    """The operations that may occur in a layer; they are the same for every batch, so a GPU can replay one graph.

    Args:
        operations: Names of the operations.
        filters: Interpolations of geometric operations, as in `batch_ops`.
    """

    operations: tuple[str, ...]
    filters: tuple[int, ...] = (NEAREST,)

    def apply(self, images: Tensor, numbers: Tensor, fill: Tensor, drawn: np.ndarray | None) -> Tensor:
        """Return images (B, C, S, S) uint8 after the layer.

        Args:
            images: The images.
            numbers: The result of `Layer.numbers`, on the same device.
            fill: (C,) uint8, the value of pixels outside the image.
            drawn: A copy of `numbers` on the CPU, to compute each operation only for the images that need it. None:
                compute every operation for all images, so that the device does the same for every batch.
        """
        out = images
        for names, change in _CHANGES:
            found = [NUMBERS[name] for name in names if name in self.operations]
            if not found:
                continue
            first, last = min(found), max(found)  # their numbers are consecutive
            if drawn is None:
                chosen = (numbers[:, 0] >= first) & (numbers[:, 0] <= last)
                out = torch.where(chosen[:, None, None, None], change(images, numbers, fill, self), out)
            elif len(places := np.flatnonzero((drawn[:, 0] >= first) & (drawn[:, 0] <= last))):
                at = sent(places, images.device)
                out = out.index_copy(0, at, change(images[at], numbers[at], fill, self))
        return out


def _geometry(images: Tensor, numbers: Tensor, fill: Tensor, kind: Kind) -> Tensor:
    return batch_ops.affine(images, numbers[:, 3:], numbers[:, 2], fill, kind.filters)


def _blend(blend: Callable[[Tensor, Tensor], Tensor], images: Tensor, numbers: Tensor, *_: object) -> Tensor:
    return blend(images, numbers[:, 1])


def _tables_of_images(tables: Callable[[Tensor], Tensor], images: Tensor, *_: object) -> Tensor:
    return batch_ops.look_up(images, tables(images))


def _tables_of_values(images: Tensor, numbers: Tensor, fill: Tensor, kind: Kind) -> Tensor:
    tables = torch.zeros(len(images), 256, dtype=torch.uint8, device=images.device)
    for name, make in _OF_VALUES.items():
        if name in kind.operations:
            mine = numbers[:, 0] == NUMBERS[name]
            tables = torch.where(mine[:, None], make(torch.where(mine, numbers[:, 1], 0.0)), tables)
    return batch_ops.look_up(images, tables[:, None])


_CHANGES: list[tuple[tuple[str, ...], Callable[[Tensor, Tensor, Tensor, Kind], Tensor]]] = [
    (GEOMETRIC, _geometry),
    *(((name,), partial(_blend, blend)) for name, blend in BLENDS.items()),
    (tuple(_OF_VALUES), _tables_of_values),
    *(((name,), partial(_tables_of_images, tables)) for name, tables in _OF_IMAGES.items()),
]


def sent(values: np.ndarray, device: torch.device) -> Tensor:
    """Return a copy of an array on a device; the CPU does not wait until a GPU has it."""
    there = torch.from_numpy(values)
    return there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there.to(device)


def matrices_of(name: str, values: np.ndarray, side: int) -> np.ndarray:
    """Return the matrices of a geometric operation for PIL's affine transform, float64 (B, 6).

    Args:
        name: The operation.
        values: (B,): a share for shear, pixels for translation, degrees for rotation.
        side: Width and height of the images, pixels.
    """
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


def kinds_of(policy: str, interpolation: str) -> list[Kind]:
    """Return the kind of each layer of a policy for which `supported` is true."""
    if match := re.fullmatch(r"torchvision-randaugment-(\d+)-(\d+)", policy):
        return [Kind(TORCHVISION)] * int(match[1])
    match = _timm_match(policy)
    assert match is not None
    fixed = {"nearest": NEAREST, "bilinear": BILINEAR, "bicubic": BICUBIC}
    filters = (BILINEAR, BICUBIC) if interpolation == "random" else (fixed[interpolation],)
    return [Kind(("Identity", *TIMM), filters)] * int(match["n"] or 2)


def layers_of(policy: str, interpolation: str, side: int, draws: Draws) -> list[Layer]:
    """Return the layers of a policy for which `supported` is true."""
    kinds = kinds_of(policy, interpolation)
    if match := re.fullmatch(r"torchvision-randaugment-(\d+)-(\d+)", policy):
        return [_torchvision(int(match[2]), side, draws, kind) for kind in kinds]
    match = _timm_match(policy)
    assert match is not None
    strength, deviation = float(match["m"]), float(match["std"] or 0)
    return [_timm(strength, deviation, side, draws, kind) for kind in kinds]


def supported(policy: str) -> bool:
    """Return whether a policy's operations are implemented here: torchvision's RandAugment, and timm's with inc1."""
    torchvision = re.fullmatch(r"torchvision-randaugment-(\d+)-(\d+)", policy)
    return bool(torchvision and int(torchvision[2]) < 31) or _timm_match(policy) is not None


def _timm_match(policy: str) -> "re.Match[str] | None":
    return re.fullmatch(r"rand-m(?P<m>\d+)(?:-n(?P<n>\d+))?(?:-mstd(?P<std>[\d.]+))?-inc1", policy)


def _torchvision(magnitude: int, side: int, draws: Draws, kind: Kind) -> Layer:
    drawn = (draws.uniform() * len(TORCHVISION)).astype(int)
    negative, share = draws.uniform() < 0.5, magnitude / 30
    strength: dict[str, float] = {
        **dict.fromkeys(("ShearX", "ShearY"), 0.3 * share),
        # torchvision gives translations in the opposite direction, from input to output
        **dict.fromkeys(("TranslateX", "TranslateY"), -float(int(150.0 / 331.0 * side * share))),
        "Rotate": 30.0 * share,
        **dict.fromkeys(BLENDS, 0.9 * share),
        "Posterize": float(8 - round(magnitude / (30 / 4))),
        "Solarize": 255.0 * (1 - share),
    }
    signed, blends = (np.isin(TORCHVISION, names)[drawn] for names in (SIGNED, list(BLENDS)))
    values = np.array([strength.get(name, 0.0) for name in TORCHVISION])[drawn]
    values = np.where(negative & signed, -values, values) + blends
    return Layer(_numbers(TORCHVISION)[drawn], values, np.full(len(drawn), NEAREST), kind)


def _timm(strength: float, deviation: float, side: int, draws: Draws, kind: Kind) -> Layer:
    operations = _numbers(TIMM)[(draws.uniform() * len(TIMM)).astype(int)]
    operations = np.where(draws.uniform() > 0.5, NUMBERS["Identity"], operations)
    level = np.clip(strength + deviation * draws.normal(), 0, 10) / 10
    sign = np.where(draws.uniform() > 0.5, -1.0, 1.0)
    values = np.zeros(len(operations))
    for name in TIMM:
        here = np.flatnonzero(operations == NUMBERS[name])
        values[here] = _timm_values(name, level[here], sign[here], side)
    drawn = (draws.uniform() * len(kind.filters)).astype(int)
    return Layer(operations, values, np.array(kind.filters)[drawn], kind)


def _numbers(names: tuple[str, ...]) -> np.ndarray:
    return np.array([NUMBERS[name] for name in names])


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
    return np.minimum(128, np.trunc(level * 110))  # SolarizeAdd, or an operation without a value


JITTER = (Kind(("Brightness", "Color", "Contrast")),) * 3  # of the layers of `jitter_layers`


def jitter_layers(strength: float, draws: Draws) -> list[Layer]:
    """Return torchvision's ColorJitter of brightness, contrast and saturation, in random order for each image."""
    order = np.argsort(np.stack([draws.uniform() for _ in range(3)]), axis=0)
    low, high = max(0.0, 1 - strength), 1 + strength
    values = np.stack([low + (high - low) * draws.uniform() for _ in range(3)])
    operations = _numbers(("Brightness", "Contrast", "Color"))
    columns = np.arange(order.shape[1])
    sampling = np.full(len(columns), NEAREST)
    return [
        Layer(operations[row], values[row, columns], sampling, kind) for row, kind in zip(order, JITTER, strict=True)
    ]


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
