"""Operations on batches against PIL at equal parameters, on random images and on flat ones."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from convmixer.data import batch_ops

SIDE = 19
FACTORS = (0.1, 0.55, 1.0, 1.37, 1.9)
FILTERS = {
    batch_ops.NEAREST: Image.Resampling.NEAREST,
    batch_ops.BILINEAR: Image.Resampling.BILINEAR,
    batch_ops.BICUBIC: Image.Resampling.BICUBIC,
}


def _pictures(count: int) -> list[Image.Image]:
    """Return noise, noise of few levels, and one flat image."""
    draw = np.random.default_rng(0)
    arrays = [draw.integers(0, 256, (SIDE, SIDE, 3)) // (1 + i % 3 * 3) + 9 * (i % 2) for i in range(count - 1)]
    arrays.append(np.full((SIDE, SIDE, 3), 77))
    return [Image.fromarray(np.clip(a, 0, 255).astype(np.uint8)) for a in arrays]


def _tensor(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (batch_ops.brightness, ImageEnhance.Brightness),
        (batch_ops.color, ImageEnhance.Color),
        (batch_ops.contrast, ImageEnhance.Contrast),
        (batch_ops.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_blends_are_pils_bytes(ours: Callable[..., torch.Tensor], theirs: Any) -> None:
    pictures = _pictures(len(FACTORS) + 1)
    factors = (*FACTORS, 1.6)
    expected = [theirs(picture).enhance(factor) for picture, factor in zip(pictures, factors, strict=True)]
    assert torch.equal(ours(_tensor(pictures), torch.tensor(factors)), _tensor(expected))


@pytest.mark.parametrize(
    ("tables", "theirs"),
    [(batch_ops.autocontrast_tables, ImageOps.autocontrast), (batch_ops.equalize_tables, ImageOps.equalize)],
)
def test_tables_made_of_an_image_are_pils(tables: Callable[..., torch.Tensor], theirs: Any) -> None:
    pictures = _pictures(7)
    images = _tensor(pictures)
    found = batch_ops.look_up(images, tables(images))
    assert torch.equal(found, _tensor([theirs(picture) for picture in pictures]))


def _matrices() -> list[list[float]]:
    angle = np.cos(0.3), np.sin(0.3)
    rotation = [angle[0], angle[1], -1.7, -angle[1], angle[0], 2.2]
    return [[1, 0, 0, 0, 1, 0], [1, 0.27, 0, 0, 1, 0], [1, 0, 0, -0.19, 1, 0], [1, 0, 5, 0, 1, -3], rotation]


@pytest.mark.parametrize("sampling", list(FILTERS))
def test_affine_sampling_is_pils(sampling: int) -> None:
    """Nearest to the byte; else one level, since PIL rounds in another order."""
    matrices = _matrices()
    pictures, fill = _pictures(len(matrices)), (120, 30, 200)
    expected = [
        picture.transform((SIDE, SIDE), Image.Transform.AFFINE, matrix, FILTERS[sampling], fillcolor=fill)
        for picture, matrix in zip(pictures, matrices, strict=True)
    ]
    found = batch_ops.affine(
        _tensor(pictures),
        torch.tensor(matrices, dtype=torch.float64),
        torch.full((len(matrices),), sampling),
        torch.tensor(fill, dtype=torch.uint8),
    )
    away = (found.int() - _tensor(expected).int()).abs()
    assert away.max() <= (0 if sampling == batch_ops.NEAREST else 1)
    assert (away > 0).float().mean() < 0.02


@pytest.mark.parametrize("sampling", [batch_ops.BILINEAR, batch_ops.BICUBIC])
def test_a_crop_scaled_up_is_pils(sampling: int) -> None:
    boxes = [(0, 0, SIDE, SIDE), (3, 1, 14, 17), (5, 6, 9, 12), (10, 0, 9, 19)]
    pictures = _pictures(len(boxes))
    expected = [
        picture.crop((left, top, left + w, top + h)).resize((SIDE, SIDE), FILTERS[sampling])
        for picture, (top, left, h, w) in zip(pictures, boxes, strict=True)
    ]
    found = batch_ops.resized_crop(_tensor(pictures), torch.tensor(boxes), torch.full((len(boxes),), sampling))
    away = (found.int() - _tensor(expected).int()).abs()
    assert away.max() <= 1
    assert (away > 0).float().mean() < 0.02


def test_a_wrong_operation_is_noticed() -> None:
    pictures = _pictures(3)
    expected = _tensor([ImageEnhance.Color(picture).enhance(1.5) for picture in pictures])
    assert not torch.equal(batch_ops.color(_tensor(pictures), torch.full((3,), 1.51)), expected)
