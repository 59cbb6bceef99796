"""Transforms of single images for training and evaluation, and of whole batches: mixing and erasing.

Random numbers of the transforms come from the global generators of Python, numpy and torch, which the loader seeds
for every image (see `sampler`). `mix` and `erase` take a generator.
"""

import functools
import math
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms

from convmixer.config import Config
from convmixer.data.datasets import DataSplits
from convmixer.data.policies import sent
from convmixer.errors import RequestError
from convmixer.preprocess import FILTERS, Preprocessing, normalise, preprocess

Transform = Callable[[Image.Image], Tensor]


def preprocessing_of(data: DataSplits, config: Config) -> Preprocessing:
    """Return the preprocessing of a run: from the settings, else from the data set.

    Raises:
        RequestError: The settings do not fit, e.g. three means for grey images.
    """
    try:
        return Preprocessing(
            img_size=config.img_size or data.img_size,
            in_chans=data.in_chans,
            mean=config.mean or data.mean,
            std=config.std or data.std,
            interpolation=config.interpolation,
            crop_pct=config.crop_pct,
            bits=data.bits,
        )
    except ValueError as error:
        raise RequestError(str(error)) from error


def eval_transform(p: Preprocessing) -> Transform:
    """Return the evaluation transform: PIL image to float32 (C, H, W)."""
    return functools.partial(_evaluate, p=p)


def _evaluate(image: Image.Image, p: Preprocessing) -> Tensor:
    return torch.from_numpy(preprocess(image, p))


def prepared_transform(p: Preprocessing) -> Transform:
    """Return the rest of the evaluation transform, for images that are already resized and cropped."""
    return functools.partial(_normalise, p=p)


def _normalise(image: Image.Image, p: Preprocessing) -> Tensor:
    return torch.from_numpy(normalise(image, p))


def train_transform(config: Config, p: Preprocessing) -> Transform:
    """Return the random training transform: PIL image (L or RGB as `p.in_chans` says) to float32 (C, H, W).

    The order is that of timm and of locuslab/convmixer-cifar10: random resized crop, padded crop, flips, automatic
    augmentation, colour jitter, normalisation. The training step then applies `mix` and `erase` to the batch.

    Args:
        config: The augmentation settings.
        p: Size, mean and standard deviation.

    Raises:
        RequestError: The policy of `auto_augment` is not known, `scale` or `ratio` is not a range, or `pad_crop` is
            too large.
    """
    for name, (low, high) in (("scale", config.scale), ("ratio", config.ratio)):
        if not 0 < low <= high:
            raise RequestError(f"{name} must be two numbers above 0, the smaller first, not {low:g},{high:g}")
    steps: list[Callable[[Image.Image], Image.Image]] = [_crop(config, p)]
    if config.pad_crop:
        if config.pad_crop >= p.img_size:
            raise RequestError(f"pad_crop must be below the image size {p.img_size}, not {config.pad_crop}")
        steps.append(transforms.RandomCrop(p.img_size, config.pad_crop, padding_mode="reflect"))
    if config.hflip and config.hflip_mode == "random":  # the loader alternates flips by epoch
        steps.append(functools.partial(_flip, probability=config.hflip, how=Image.Transpose.FLIP_LEFT_RIGHT))
    if config.vflip:
        steps.append(functools.partial(_flip, probability=config.vflip, how=Image.Transpose.FLIP_TOP_BOTTOM))
    if config.auto_augment:
        steps.append(auto_augment(config.auto_augment, config.train_interpolation, p))
    if config.color_jitter:
        steps.append(transforms.ColorJitter(*(config.color_jitter,) * 3))
    return TrainTransform(steps, p)


def crop_transform(config: Config, p: Preprocessing) -> Transform:
    """Return the first step of `train_transform` alone, the crop: PIL image to uint8 (C, S, S)."""
    return functools.partial(_cropped, crop=_crop(config, p), channels=p.in_chans)


def _cropped(image: Image.Image, crop: Callable[[Image.Image], Image.Image], channels: int) -> Tensor:
    pixels = np.array(crop(image), np.uint8)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1).contiguous()


class TrainTransform:
    """The steps of `train_transform` in order; a class so that worker processes can receive it."""

    def __init__(self, steps: list[Any], p: Preprocessing) -> None:
        self.steps, self.p = steps, p

    def __call__(self, image: Image.Image) -> Tensor:
        """Return one random version of the image, float32 (C, H, W)."""
        for step in self.steps:
            image = step(image)
        return _normalise(image, self.p)


def _crop(config: Config, p: Preprocessing) -> Callable[[Image.Image], Image.Image]:
    crop = RandomResizedCropAndInterpolation(
        p.img_size, scale=config.scale, ratio=config.ratio, interpolation=config.train_interpolation
    )
    whole = config.scale == (1.0, 1.0) and config.ratio == (1.0, 1.0)
    return functools.partial(_crop_unless_whole, crop=crop, size=(p.img_size,) * 2 if whole else None)


def _crop_unless_whole(image: Image.Image, crop: Any, size: tuple[int, int] | None) -> Image.Image:
    return image if image.size == size else crop(image)  # already of this size


def _flip(image: Image.Image, probability: float, how: Image.Transpose) -> Image.Image:
    return image.transpose(how) if random.random() < probability else image


def auto_augment(policy: str, interpolation: str, p: Preprocessing) -> Callable[[Image.Image], Image.Image]:
    """Return an automatic augmentation policy.

    Args:
        policy: A timm policy ("rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original", "v0", "3a", ...), or
            "torchvision-randaugment-N-M": torchvision's RandAugment of N operations at magnitude M. Pixels outside
            the image get the mean colour with timm's policies, and black with torchvision's.
        interpolation: Filter of geometric operations of a timm policy; "random": bilinear or bicubic.
        p: Size and mean.

    Raises:
        RequestError: The policy is not known.
    """
    if match := re.fullmatch(r"torchvision-randaugment-(\d+)-(\d+)", policy):
        return _TorchvisionRandAugment(int(match[1]), int(match[2]))
    fill = tuple(min(255, round(255 * value)) for value in p.mean)
    params: dict[str, Any] = {
        "translate_const": int(p.img_size * 0.45),
        "img_mean": fill if len(fill) > 1 else fill[0],
    }
    if interpolation != "random":
        params["interpolation"] = FILTERS[interpolation]
    makers = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    try:
        return makers.get(policy.split("-")[0], auto_augment_transform)(policy, params)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise RequestError(
            f"auto_augment {policy!r} is not known: use a timm policy such as rand-m9-mstd0.5-inc1, "
            "or torchvision-randaugment-N-M"
        ) from error


class _TorchvisionRandAugment(transforms.RandAugment):
    """torchvision's RandAugment, building its table of magnitudes (14 tensors) once instead of for each image."""

    def __init__(self, num_ops: int, magnitude: int) -> None:
        super().__init__(num_ops, magnitude)
        self._tables: dict[Any, Any] = {}

    def _augmentation_space(self, num_bins: int, image_size: tuple[int, int]) -> Any:
        key = (num_bins, tuple(image_size))
        if key not in self._tables:
            self._tables[key] = super()._augmentation_space(num_bins, image_size)
        return self._tables[key]


def mix(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    config: Config,
    generator: torch.Generator,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return a batch after mixup or cutmix and its soft targets; image i is mixed with image B - 1 - i.

    Args:
        images: (B, C, H, W); not changed.
        labels: int64 (B,).
        num_classes: Width of the targets.
        config: Its settings `mixup`, `cutmix`, `mixup_prob`, `mixup_switch_prob` and `smoothing` are used.
        generator: The only source of randomness; one number is drawn from it.
        weights: float32 (B,), weight of each image in the loss; None: 1.

    Returns:
        Images like the input, and targets float32 (B, num_classes), whose rows sum to the weights.

    Source: timm's Mixup in batch mode, with its label smoothing; the same random numbers give the same result.
    """
    lam = 1.0
    if config.mixup or config.cutmix:
        np.random.seed(int(torch.randint(2**32, (1,), generator=generator)))  # timm's functions draw from it
        images, lam = _mix_images(images, config)
    if weights is None:
        return images, mixup_target(labels, num_classes, lam, config.smoothing)
    targets = mixup_target(labels, num_classes, 1.0, config.smoothing) * weights[:, None]
    return images, targets * lam + targets.flip(0) * (1 - lam)


def _mix_images(images: Tensor, config: Config) -> tuple[Tensor, float]:
    if np.random.rand() >= config.mixup_prob:
        return images, 1.0
    cut = np.random.rand() < config.mixup_switch_prob if config.mixup and config.cutmix else bool(config.cutmix)
    alpha = config.cutmix if cut else config.mixup
    lam = float(np.random.beta(alpha, alpha))
    if not cut:
        return images * lam + images.flip(0) * (1 - lam), lam
    (top, bottom, left, right), lam = cutmix_bbox_and_lam(images.shape, lam)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return mixed, float(lam)


def erase(images: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """Return a batch after random erasing of each image; as in timm, it comes after `mix`.

    Args:
        images: Normalised images (B, C, H, W); they are changed in place.
        config: Its settings `random_erasing` and `erasing_mode` are used.
        generator: One number is drawn from it and chooses the boxes. The boxes are filled from torch's global
            generator of the device.

    Returns:
        The same images.
    """
    if not config.random_erasing:
        return images
    draw = np.random.default_rng(int(torch.randint(2**32, (1,), generator=generator)))
    chosen, boxes = erasing_boxes(config.random_erasing, images.shape, draw)
    if not len(chosen):
        return images
    at, (top, left, height, width) = sent(chosen, images.device), sent(boxes, images.device).T[:, :, None, None, None]
    y = torch.arange(images.shape[2], device=images.device)[:, None]
    x = torch.arange(images.shape[3], device=images.device)
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    shape = {"pixel": images.shape[1:], "rand": (images.shape[1], 1, 1), "const": (1, 1, 1)}[config.erasing_mode]
    make = torch.zeros if config.erasing_mode == "const" else torch.randn
    filling = make(len(chosen), *shape, dtype=images.dtype, device=images.device)
    return images.index_copy_(0, at, torch.where(inside, filling, images[at]))


def erasing_boxes(
    probability: float, shape: tuple[int, ...], draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return which images of a batch (B, C, H, W) are erased, int64 (n,), and their boxes (top, left, height, width),
    int64 (n, 4).

    Source: timm's RandomErasing: 2% to a third of the area, an aspect ratio of 0.3 to 1 / 0.3, ten tries.
    """
    B, _, H, W = shape
    area = H * W * draw.uniform(0.02, 1 / 3, (10, B))
    aspect = np.exp(draw.uniform(math.log(0.3), -math.log(0.3), (10, B)))
    height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (height < H) & (width < W)
    at = fits.argmax(0), np.arange(B)
    height, width = height[at], width[at]
    top, left = (np.floor(draw.uniform(size=B) * (side - length + 1)) for side, length in ((H, height), (W, width)))
    chosen = np.flatnonzero((draw.uniform(size=B) <= probability) & fits.any(0))
    return chosen, np.stack((top, left, height, width), 1)[chosen].astype(np.int64)
