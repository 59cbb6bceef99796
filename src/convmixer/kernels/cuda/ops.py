"""The ops of `convmixer.kernels.ops` for CUDA, which call the Triton kernels and return the same as the C++ ops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convmixer.kernels.cuda import blocks, depthwise, product, rows, sums

Sums = Tensor  # float64 (count, C)


def _double(parts: Tensor) -> Sums:
    return sums.total(parts, torch.float64).t().contiguous()


def spatial_forward(
    before: Tensor, norm: Tensor, weight: Tensor, bias: Tensor, act: int, statistics: bool
) -> tuple[Tensor, Sums]:
    x = rows.act_norm(before, norm, act)
    u, parts = depthwise.forward(x, depthwise.taps_of(weight), bias, act)
    return u, _double(parts)


def spatial_backward(
    grad: Tensor, u: Tensor, norm: Tensor, before: Tensor, norm_before: Tensor, weight: Tensor, act: int
) -> tuple[Tensor, Tensor, Sums]:
    x, du = rows.act_norm(before, norm_before, act), torch.empty_like(grad)
    bias_grad = _double(rows.act_norm_backward(grad, u, norm, du, act))
    weight_grad = sums.total(depthwise.weight_gradient(x, du, weight.shape[2])).view_as(weight)
    dx, parts = depthwise.input_gradient(du, grad, before, depthwise.taps_of(weight), act)
    grad.copy_(dx)
    return weight_grad, bias_grad, _double(parts)


def channel_forward(
    u: Tensor,
    norm: Tensor,
    before: Tensor,
    norm_before: Tensor,
    weight: Tensor,
    bias: Tensor,
    act: int,
    statistics: bool,
) -> tuple[Tensor, Sums]:
    x = rows.act_norm(before, norm_before, act)
    v, parts = product.forward(u, norm, x, weight, bias, act)
    return v, _double(parts)


def channel_backward(
    grad: Tensor,
    v: Tensor,
    norm_v: Tensor,
    u: Tensor,
    norm: Tensor,
    before: Tensor,
    norm_before: Tensor,
    weight: Tensor,
    act: int,
) -> tuple[Tensor, Tensor, Sums]:
    dv, h, _, parts = rows.operands(grad, v, norm_v, u, norm, before, norm_before, act)
    weight_grad = product.weight_gradient(dv, h)
    return weight_grad, _double(parts), _double(product.input_gradient(dv, weight, u, grad, act))


def act_statistics(v: Tensor, act: int) -> Sums:
    return _double(rows.statistics(v, act))


def act_products(grad: Tensor, v: Tensor, act: int) -> Sums:
    return _double(rows.products(grad, v, act))


def act_norm_pool_backward(grad: Tensor, v: Tensor, act: int) -> tuple[Tensor, Sums]:
    dy, parts = rows.pool_backward(grad, v, act)
    return dy, _double(parts)


def act_norm_backward(grad: Tensor, v: Tensor, norm: Tensor, act: int) -> None:
    rows.act_norm_backward(grad, v, norm, grad, act)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "spatial_forward": spatial_forward,
    "spatial_backward": spatial_backward,
    "channel_forward": channel_forward,
    "channel_backward": channel_backward,
    "act_statistics": act_statistics,
    "act_products": act_products,
    "act_norm": rows.act_norm,
    "act_norm_pool": rows.pool,
    "act_norm_pool_backward": act_norm_pool_backward,
    "act_norm_backward": act_norm_backward,
    "blocks": blocks.forward,
    "blocks_backward": blocks.backward,
}
