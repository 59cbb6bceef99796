"""Runs the CUDA kernels of all blocks of a ConvMixer in order: the GPU's part of `convmixer.kernels.blocks`.

At inference each half of a block, depthwise or pointwise, is one launch. In training a launch before them computes
the block's input x = norm(act(v)), with v of the previous block. Each half then also writes parts of the sums for
its BatchNorm; after it a small kernel adds the parts and computes the scale and shift that the next kernel applies
(see `sums`). In fp32, and in training with more than `product.FUSED_WIDTH` channels, the pointwise half takes more
launches (see `product`).

As on the CPU, two tensors of each block are kept for the backward pass: u and v, the outputs of the depthwise and of
the pointwise convolution.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from convmixer.kernels.cuda import depthwise, product, rows, sums

PER_BLOCK = 8  # see `convmixer.kernels.blocks`


class Block(NamedTuple):
    """The parameters of a block, in their order."""

    taps: Tensor
    taps_bias: Tensor
    weight_1: Tensor
    bias_1: Tensor
    matrix: Tensor
    matrix_bias: Tensor
    weight_2: Tensor
    bias_2: Tensor


def forward(
    v: Tensor,
    parameters: list[Tensor],
    running: list[Tensor],
    eps: float,
    act: int,
    training: bool,
    pool: bool,
    take: Sequence[int],
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The op `convmixer::blocks`."""
    if not training:
        scales, statistics = running_scales(parameters, running, eps)
        if not keep and not take:
            return infer(v, prepare(parameters, v.dtype), scales, act, pool), [statistics]
    else:
        statistics = _statistics_like(parameters)
        scales = None
    count = v.numel() // v.shape[3]

    def norm(i: int, weight: Tensor, bias: Tensor, parts: Tensor | None) -> Tensor:
        if scales is not None:
            return scales[i]
        assert parts is not None
        return sums.scale_shift(parts, sums.Norm(weight, bias, eps, count), statistics[i])

    kept: list[Tensor] = []
    taken: list[Tensor] = []
    before = v
    norm_before = norm(0, parameters[0], parameters[1], rows.statistics(v, act) if training else None)
    for i, block in enumerate(_blocks(parameters)):
        x = rows.act_norm(before, norm_before, act)
        taken += [x] if i in take else []
        u, parts = depthwise.forward(x, depthwise.taps_of(block.taps), block.taps_bias, act)
        norm_u = norm(2 * i + 1, block.weight_1, block.bias_1, parts)
        matrix = block.matrix.flatten(1).to(v.dtype)
        before, parts = product.forward(u, norm_u, x, matrix, block.matrix_bias, act)
        norm_before = norm(2 * i + 2, block.weight_2, block.bias_2, parts)
        kept += [u, before] if keep else []
    taken += [rows.act_norm(before, norm_before, act)] if len(parameters) // PER_BLOCK in take else []
    y = rows.pool(before, norm_before, act) if pool else rows.act_norm(before, norm_before, act)
    return y, [*taken, *kept, statistics]


def backward(
    grad: Tensor,
    v: Tensor,
    parameters: list[Tensor],
    kept: list[Tensor],
    eps: float,
    act: int,
    training: bool,
    pool: bool,
    take: Sequence[int],
    taken_grads: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """The op `convmixer::blocks_backward`."""
    *kept, statistics = kept
    outputs, count = [v, *kept[1::2]], v.numel() // v.shape[3]
    scales = _scales(parameters, statistics, eps)
    if pool:
        grad, parts = rows.pool_backward(grad.float().contiguous(), outputs[-1], act)
    else:
        grad = grad.to(v.dtype).contiguous()
        parts = rows.products(grad, outputs[-1], act)

    given = dict(zip(take, taken_grads, strict=True))

    def with_taken(grad: Tensor, parts: Tensor, after: int) -> tuple[Tensor, Tensor]:
        """Return grad plus that of the features taken after `after` blocks, if any, and the parts of its sums."""
        if after not in given:
            return grad, parts
        taken = given[after].to(grad.dtype).contiguous()
        return grad + taken, torch.cat((parts, rows.products(taken, outputs[after], act)))

    def norm(i: int, weight: Tensor, parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return sums.gradients(parts, sums.Norm(weight, weight, eps, count), statistics[i], training)

    grad, parts = with_taken(grad, parts, len(outputs) - 1)
    gradients: list[Tensor] = []
    for i, block in reversed(list(enumerate(_blocks(parameters)))):
        u, before, after = kept[2 * i], outputs[i], outputs[i + 1]
        norm_u, norm_before = scales[2 * i + 1], scales[2 * i]
        back, *norm_2 = norm(2 * i + 2, block.weight_2, parts)
        dv, h, x, bias_parts = rows.operands(grad, after, back, u, norm_u, before, norm_before, act)
        matrix_grad = product.weight_gradient(dv, h).view_as(block.matrix)
        matrix_bias = sums.total(bias_parts)[:, 0]
        dh = h  # reuses the memory of h: the weight gradient is already computed
        parts = product.input_gradient(dv, block.matrix.flatten(1).to(v.dtype), u, dh, act)
        back, *norm_1 = norm(2 * i + 1, block.weight_1, parts)
        du = dv
        taps_bias = sums.total(rows.act_norm_backward(dh, u, back, du, act))[:, 0]
        taps_grad = sums.total(depthwise.weight_gradient(x, du, block.taps.shape[2])).view_as(block.taps)
        grad, parts = depthwise.input_gradient(du, dh, before, depthwise.taps_of(block.taps), act)
        grad, parts = with_taken(grad, parts, i)
        gradients = [taps_grad, taps_bias, *norm_1, matrix_grad, matrix_bias, *norm_2, *gradients]
    back, *norm_0 = norm(0, parameters[0], parts)
    out = torch.empty_like(grad)  # `grad` may be the caller's if there are no blocks
    rows.act_norm_backward(grad, v, back, out, act)
    return out, [*norm_0, *gradients]


class Prepared(NamedTuple):
    """The convolutions of a block as the kernels read them."""

    taps: Tensor
    taps_bias: Tensor
    matrix: Tensor
    matrix_bias: Tensor


def prepare(parameters: list[Tensor], dtype: torch.dtype) -> list[Prepared]:
    """Return the convolutions of all blocks for inference with a dtype."""
    return [
        Prepared(depthwise.taps_of(b.taps), b.taps_bias, b.matrix.flatten(1).to(dtype), b.matrix_bias)
        for b in _blocks(parameters)
    ]


def infer(v: Tensor, prepared: list[Prepared], scales: Tensor, act: int, pool: bool) -> Tensor:
    """Run the stem's activation and norm, then all blocks, with running statistics and without gradients.

    Args:
        v: (N, H, W, C).
        prepared: See `prepare`.
        scales: Scale and shift of all norms, from `running_scales`.
        act: 0 for GELU, 1 for ReLU.
        pool: Return the mean over the image, (N, C) fp32.
    """
    if pool and not prepared:
        return rows.pool(v, scales[0], act)
    x = rows.act_norm(v, scales[0], act)
    for i, block in enumerate(prepared):
        h = depthwise.forward_norm(x, block.taps, block.taps_bias, scales[2 * i + 1], act)
        x = product.forward_norm(h, block.matrix, block.matrix_bias, scales[2 * i + 2], act)
    return x.mean((1, 2), dtype=torch.float32) if pool else x


def _blocks(parameters: list[Tensor]) -> list[Block]:
    return [Block(*parameters[i : i + PER_BLOCK]) for i in range(2, len(parameters), PER_BLOCK)]


def _norms(parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights and the biases of all norms, in their order."""
    weights, biases = [parameters[0]], [parameters[1]]
    for block in _blocks(parameters):
        weights += [block.weight_1, block.weight_2]
        biases += [block.bias_1, block.bias_2]
    return weights, biases


def _statistics_like(parameters: list[Tensor]) -> Tensor:
    norms = 1 + 2 * ((len(parameters) - 2) // PER_BLOCK)
    first = parameters[0]
    return torch.empty((norms, 2, first.shape[0]), dtype=torch.float64, device=first.device)


def running_scales(parameters: list[Tensor], running: list[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Return scale and shift of all norms, fp32 (norms, 2, C), and the running statistics as float64."""
    statistics = torch.stack(running).view(-1, 2, running[0].shape[0]).double()
    return _scales(parameters, statistics, eps), statistics


def _scales(parameters: list[Tensor], statistics: Tensor, eps: float) -> Tensor:
    """Return scale and shift of all norms, fp32 (norms, 2, C), in a few launches."""
    weights, biases = (torch.stack(vectors) for vectors in _norms(parameters))
    scale = weights * torch.rsqrt(statistics[:, 1] + eps)
    return torch.stack((scale, biases - statistics[:, 0] * scale), 1).float()
