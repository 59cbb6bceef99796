"""Blocks whose spatial mixer is any torch module; the kernels compute the rest of the block.

If models differ only in the mixer, only the mixer should affect their time and memory. The names are those of
`blocks`: u is the output of the mixer, v that of the pointwise convolution; norm(act(v)) is the next block's input x.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from convmixer.kernels.blocks import norm_gradients, scale_shift, statistics_of

PER_BLOCK = 6  # norm weight and bias, pointwise weight and bias, norm weight and bias
_kernels = torch.ops.convmixer


def features(
    v: Tensor,
    mixers: Sequence[Callable[[Tensor], Tensor]],
    parameters: list[Tensor],
    running: list[Tensor],
    eps: float,
    act: int,
    training: bool,
    take: Sequence[int] = (),
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run the stem's activation and norm, then all blocks.

    Args:
        v: Output of the stem's last convolution, (N, H, W, C), contiguous, fp32 or bf16.
        mixers: One function for each block, (N, C, H, W) -> (N, C, H, W).
        parameters: fp32: the stem norm's weight and bias, then `PER_BLOCK` tensors for each block.
        running: Running mean and variance of each norm, used if not `training`.
        eps: Epsilon of BatchNorm.
        act: 0 for GELU, 1 for ReLU.
        training: Use the batch's statistics.
        take: Numbers of blocks, ascending: the features after so many blocks are returned too.

    Returns:
        The features, (N, H, W, C); the mean and variance that each norm used, float64 (norms, 2, C); the features for
        `take`. The variance is biased if `training`; else it is the running variance, which is unbiased.

    Source: arXiv 2201.09792, Sec. 2, Eq. 2 and 3 with another function for the depthwise convolution.
    """
    stem_statistics = _act_statistics(v.detach(), running[:2], eps, act, training)
    x = _ActNorm.apply(v, *parameters[:2], stem_statistics, eps, act, training)
    before, norm_before = v.detach(), scale_shift(parameters[0], parameters[1], stem_statistics, eps).detach()
    statistics, taken = [stem_statistics], [x] if 0 in take else []
    for i, mixer in enumerate(mixers):
        u = mixer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).to(v.dtype).contiguous()
        own = parameters[2 + PER_BLOCK * i : 2 + PER_BLOCK * (i + 1)]
        own_running = running[2 + 4 * i : 6 + 4 * i]
        x, before, norm_before, *used = _Rest.apply(u, x, before, norm_before, *own, own_running, eps, act, training)
        statistics += used
        taken += [x] if i + 1 in take else []
    return x, torch.stack(statistics), taken


def _act_statistics(v: Tensor, running: list[Tensor], eps: float, act: int, training: bool) -> Tensor:
    """Return the statistics of act(v) that the norm uses, float64 (2, C)."""
    return statistics_of(_kernels.act_statistics(v, act) if training else None, v, running, eps, act)


class _ActNorm(torch.autograd.Function):
    """Computes norm(act(v))."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, eps: float, act: int, training: bool
    ) -> Tensor:
        ctx.save_for_backward(v, weight, statistics)
        ctx.settings = eps, act, training
        y: Tensor = _kernels.act_norm(v, scale_shift(weight, bias, statistics, eps), act)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (v, weight, statistics), (eps, act, training) = ctx.saved_tensors, ctx.settings
        grad = grad.to(v.dtype, copy=True).contiguous()  # the kernel writes into it
        sums = _kernels.act_products(grad, v, act)
        back, *gradients = norm_gradients(weight, statistics, sums, v.numel() // v.shape[3], eps, training)
        _kernels.act_norm_backward(grad, v, back, act)
        return grad, *gradients, None, None, None, None


class _Rest(torch.autograd.Function):
    """The rest of a block, after its mixer: v = pointwise(norm(act(u)) + x) and norm(act(v)).

    The kernels compute x again from `before`, the v of the previous block, as in `blocks`. x is an argument only so
    that autograd gives it a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        x: Tensor,
        before: Tensor,
        norm_before: Tensor,
        weight_1: Tensor,
        bias_1: Tensor,
        pointwise: Tensor,
        pointwise_bias: Tensor,
        weight_2: Tensor,
        bias_2: Tensor,
        running: list[Tensor],
        eps: float,
        act: int,
        training: bool,
    ) -> tuple[Tensor, ...]:
        statistics_1 = _act_statistics(u, running[:2], eps, act, training)
        norm_u = scale_shift(weight_1, bias_1, statistics_1, eps)
        matrix = pointwise.flatten(1).to(u.dtype)
        v, sums = _kernels.channel_forward(u, norm_u, before, norm_before, matrix, pointwise_bias, act, training)
        statistics_2 = statistics_of(sums if training else None, v, running[2:], eps, act)
        norm_v = scale_shift(weight_2, bias_2, statistics_2, eps)
        ctx.save_for_backward(
            u, before, norm_before, norm_u, pointwise, weight_1, weight_2, statistics_1, statistics_2, v
        )
        ctx.settings = eps, act, training
        rest = v, norm_v, statistics_1, statistics_2
        ctx.mark_non_differentiable(*rest)
        return _kernels.act_norm(v, norm_v, act), *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        eps, act, training = ctx.settings
        u, before, norm_before, norm_u, pointwise, weight_1, weight_2, *statistics, v = ctx.saved_tensors
        count = v.numel() // v.shape[3]
        grad = grad.to(v.dtype, copy=True).contiguous()
        sums = _kernels.act_products(grad, v, act)
        back, *norm_2 = norm_gradients(weight_2, statistics[1], sums, count, eps, training)
        pointwise_grad, bias_grad, sums = _kernels.channel_backward(
            grad, v, back, u, norm_u, before, norm_before, pointwise.flatten(1).to(v.dtype), act
        )  # grad now holds the gradient of the residual sum
        back, *norm_1 = norm_gradients(weight_1, statistics[0], sums, count, eps, training)
        u_grad = grad.clone()
        _kernels.act_norm_backward(u_grad, u, back, act)
        channel = pointwise_grad.view_as(pointwise), bias_grad[0].float()
        return u_grad, grad, None, None, *norm_1, *channel, *norm_2, None, None, None, None
