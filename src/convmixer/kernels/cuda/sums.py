"""Sums over the batch without atomics: each program writes a part, and kernels here add the parts in a fixed order.

This makes results the same every time, bit for bit. The parts of S sums for each channel are fp32 (P, S, C), with P
programs. A single launch adds the parts of a norm's sums and computes its scale and shift for the next kernel. With
separate PyTorch operations, this would take a dozen launches.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHANNELS = 16  # channels per program: 64 bytes of each part
_PARTS = 256  # parts that are loaded at once


class Norm(NamedTuple):
    """The inputs of a norm: weight and bias, (C,) fp32, eps, and the number of values in each sum."""

    weight: Tensor
    bias: Tensor
    eps: float
    count: int


def scale_shift(parts: Tensor, norm: Norm, statistics: Tensor) -> Tensor:
    """Return the scale and shift of a norm, fp32 (2, C), and write its mean and variance to `statistics`.

    Args:
        parts: Parts of the sums of values and of their squares, (P, 2, C).
        norm: The norm.
        statistics: float64 (2, C), is overwritten.
    """
    P, _, C = parts.shape
    out = torch.empty((2, C), dtype=torch.float32, device=parts.device)
    _scale_shift[_grid(C)](
        parts, P, C, norm.weight, norm.bias, norm.eps, norm.count, statistics, out, PARTS=_PARTS, CHANNELS=_CHANNELS
    )
    return out


def gradients(parts: Tensor, norm: Norm, statistics: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Add the parts (P, 2, C) of two sums: of g, the gradient of norm(act(v)), and of g * act(v).

    Returns:
        The coefficients of `activation.norm_backward`, fp32 (3, C), and the gradients of the norm's weight and bias.
    """
    P, _, C = parts.shape
    out = torch.empty((5, C), dtype=torch.float32, device=parts.device)
    _gradients[_grid(C)](
        parts, P, C, norm.weight, statistics, norm.eps, norm.count, out,
        TRAINING=training, PARTS=_PARTS, CHANNELS=_CHANNELS,
    )  # fmt: skip
    return out[:3], out[3], out[4]


def total(parts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the sums of parts (P, S, C) over P, transposed: (C, S)."""
    P, S, C = parts.shape
    out = torch.empty((C, S), dtype=dtype, device=parts.device)
    grid = (triton.cdiv(C, _CHANNELS), S)
    _total[grid](parts, P, C, S, out, PARTS=_PARTS, CHANNELS=_CHANNELS)
    return out


def _grid(channels: int) -> tuple[int]:
    return (triton.cdiv(channels, _CHANNELS),)


@triton.jit
def _add(parts, P, stride, c, present, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    sums = tl.zeros([PARTS, CHANNELS], tl.float64)
    for first in range(0, P, PARTS):
        p = first + tl.arange(0, PARTS)
        here = (p < P)[:, None] & present[None, :]
        sums += tl.load(parts + p[:, None] * stride + c[None, :], mask=here, other=0.0).to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit
def _scale_shift(parts, P, C, weight, bias, eps, count, statistics, out, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    here = c < C
    mean = _add(parts, P, 2 * C, c, here, PARTS, CHANNELS) / count
    square = _add(parts + C, P, 2 * C, c, here, PARTS, CHANNELS) / count
    variance = square - mean * mean
    variance = tl.where(variance < 0.0, 0.0, variance)
    tl.store(statistics + c, mean, mask=here)
    tl.store(statistics + C + c, variance, mask=here)
    scale = tl.load(weight + c, mask=here, other=0.0) / tl.sqrt(variance + eps)
    tl.store(out + c, scale.to(tl.float32), mask=here)
    tl.store(out + C + c, (tl.load(bias + c, mask=here, other=0.0) - mean * scale).to(tl.float32), mask=here)


@triton.jit
def _gradients(
    parts, P, C, weight, statistics, eps, count, out,
    TRAINING: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    here = c < C
    bias_grad = _add(parts, P, 2 * C, c, here, PARTS, CHANNELS)
    product = _add(parts + C, P, 2 * C, c, here, PARTS, CHANNELS)
    mean = tl.load(statistics + c, mask=here, other=0.0)
    rstd = 1.0 / tl.sqrt(tl.load(statistics + C + c, mask=here, other=1.0) + eps)
    weight_grad = rstd * (product - mean * bias_grad)
    a = tl.load(weight + c, mask=here, other=0.0) * rstd
    b = a * 0.0
    d = b
    if TRAINING:
        b = -a * rstd * weight_grad / count
        d = -a * bias_grad / count - b * mean
    tl.store(out + c, a.to(tl.float32), mask=here)
    tl.store(out + C + c, b.to(tl.float32), mask=here)
    tl.store(out + 2 * C + c, d.to(tl.float32), mask=here)
    tl.store(out + 3 * C + c, weight_grad.to(tl.float32), mask=here)
    tl.store(out + 4 * C + c, bias_grad.to(tl.float32), mask=here)


@triton.jit
def _total(parts, P, C, S, out, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    s = tl.program_id(1)
    sums = _add(parts + s * C, P, S * C, c, c < C, PARTS, CHANNELS)
    tl.store(out + c * S + s, sums.to(out.dtype.element_ty), mask=c < C)
