"""All blocks of a ConvMixer as one differentiable op.

This file calls the kernels in order, and does the arithmetic on (C,) vectors: the norms' scales, statistics and
gradients. Only the outputs of convolutions are stored. A kernel that reads such an output v also gets the scale and
shift of the norm after it, and computes norm(act(v)) itself; `before` is the v of the previous block. The backward
pass needs two outputs per block, u of the depthwise and v of the pointwise convolution, and the statistics of each
norm, float64 (norms, 2, C): mean and variance. Without gradients each output is freed after use.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from convmixer.kernels.ops import LIBRARY, differentiable_once

PER_BLOCK = 8  # depthwise weight and bias, norm weight and bias, pointwise weight and bias, norm weight and bias
CANCELLED = 32  # limit of |mean| / standard deviation: above it the variance is computed again, in two passes
_kernels = torch.ops.convmixer


def features(
    v: Tensor,
    parameters: list[Tensor],
    running: list[Tensor],
    eps: float,
    act: int,
    training: bool,
    pool: bool,
    take: Sequence[int] = (),
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run the stem's activation and norm, then all blocks.

    Args:
        v: Output of the stem's convolution, (N, H, W, C) or padded with zeros to (N, H, W, wide(C)); contiguous;
            fp32, bf16 or, on CUDA, fp16. All activations have its dtype.
        parameters: fp32: the stem norm's weight and bias, then `PER_BLOCK` tensors for each block.
        running: Running mean and variance of each norm, used if not `training`.
        eps: Epsilon of BatchNorm.
        act: 0 for GELU, 1 for ReLU.
        training: Use the batch's statistics.
        pool: Return the mean over the image, (N, C) fp32, instead of the features (N, H, W, C).
        take: Numbers, ascending: for each n of them, the features after the first n blocks are returned too.

    Returns:
        The features; the mean and variance that each norm used, float64 (norms, 2, C); the features for `take`.
        The variance is biased if `training`; else it is the running variance, which is unbiased.

    Source: arXiv 2201.09792, Sec. 2, Eq. 1 to 3.
    """
    C = len(parameters[0])
    v, parameters, running = _widened(v, parameters, running)
    y, rest = _kernels.blocks(v, parameters, running, eps, act, training, pool, take, torch.is_grad_enabled())
    return y[..., :C].contiguous(), rest[-1][..., :C], [x[..., :C].contiguous() for x in rest[: len(take)]]


@torch.no_grad()
def frozen(v: Tensor, parameters: list[Tensor], running: list[Tensor], eps: float, act: int) -> Tensor:
    """Run the stem's activation and norm, then frozen blocks, up to the pointwise convolution of the last of them.

    Args:
        v, parameters, eps, act: As in `features`.
        running: Running mean and variance of each norm.

    Returns:
        The output of that convolution, an input `v` of `features`. If there is no block, the argument `v` itself.
    """
    v, parameters, running = _widened(v, parameters, running)
    for i in range((len(parameters) - 2) // PER_BLOCK):
        block = parameters[PER_BLOCK * i : PER_BLOCK * i + 2 + PER_BLOCK]  # and the norm before the block
        # To get v, the op must return all tensors that a backward pass needs. It is called once per block, so that
        # they are held for one block only. The pooled features that it also returns are not used, and cost little.
        _, (_, v, _) = _kernels.blocks(v, block, running[4 * i : 4 * i + 6], eps, act, False, True, [], True)
    return v


@torch.no_grad()
def frozen_norm(
    v: Tensor, weight: Tensor, bias: Tensor, running: list[Tensor], eps: float, act: int
) -> tuple[Tensor, Tensor]:
    """Return a weight and bias with which a norm on the batch's statistics gives the output of a frozen norm.

    A frozen norm uses its running statistics, but `features` with `training` uses the batch's for all norms.

    Args:
        v: Output of the convolution before the activation and the norm, (N, H, W, C) or (N, H, W, wide(C)).
        weight, bias: Weight and bias of the norm, fp32 (C,).
        running: Running mean and variance of the norm.
        eps: Epsilon of BatchNorm.
        act: 0 for GELU, 1 for ReLU.
    """
    scale, shift = scale_shift(weight, bias, torch.stack(running).double(), eps).double()
    mean, variance = statistics_of(_kernels.act_statistics(v, act), v, running, eps, act)[:, : len(weight)]
    return (scale * (variance + eps).sqrt()).float(), (shift + mean * scale).float()


def wide(channels: int) -> int:
    """Return `channels` rounded up to a multiple of 8, the length of an fp32 vector of AVX2.

    On AVX2 a training step takes a sixth longer if the channels of a pixel are not aligned to vectors. Other
    processors were not measured.
    """
    return channels + -channels % 8


def _widened(v: Tensor, parameters: list[Tensor], running: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Pad all tensors with zeros up to `wide` channels. The added ones stay zero and add nothing to the others."""
    C = len(parameters[0])
    more = wide(C) - C
    if not more:
        return v, parameters, running
    v = v if v.shape[3] == wide(C) else F.pad(v, (0, more))
    vector, depthwise, pointwise = (0, more), (0,) * 7 + (more,), (0, 0, 0, 0, 0, more, 0, more)
    block = [depthwise, vector, vector, vector, pointwise, vector, vector, vector]
    sides = [vector, vector, *block * (len(parameters) // PER_BLOCK)]
    parameters = [F.pad(tensor, side) for tensor, side in zip(parameters, sides, strict=True)]
    return v, parameters, [F.pad(tensor, vector) for tensor in running]


def scale_shift(weight: Tensor, bias: Tensor, statistics: Tensor, eps: float) -> Tensor:
    """Return the scale and the shift that a norm applies, fp32 (2, C).

    Args:
        weight, bias: (C,).
        statistics: Mean and variance, float64 (2, C).
        eps: BatchNorm's.
    """
    scale = weight * torch.rsqrt(statistics[1] + eps)
    return torch.stack((scale, bias - statistics[0] * scale)).float()


def statistics_of(sums: Tensor | None, v: Tensor, running: list[Tensor], eps: float, act: int) -> Tensor:
    """Return mean and variance of act(v), float64 (2, C).

    Args:
        sums: Sums of the values and of their squares over the batch, float64 (2, C); None: use `running`.
        v: Output of a convolution, (N, H, W, C).
        running: Running mean and variance, (C,) each.
        eps: BatchNorm's.
        act: 0 for GELU, 1 for ReLU.
    """
    if sums is None:
        return torch.stack(running).double()
    mean, square = sums / (v.numel() // v.shape[3])
    found = torch.stack((mean, (square - mean * mean).clamp_(min=0)))
    return _without_cancellation(found, v, eps, act) if v.device.type == "cpu" else found  # it would stall a GPU


def _without_cancellation(found: Tensor, v: Tensor, eps: float, act: int) -> Tensor:
    """Compute the variance in two passes for channels with |mean| >> deviation, where fp32 squares lose it."""
    mean, variance = found.numpy()  # on a few values numpy takes a third of torch's time
    lost = np.abs(mean) > CANCELLED * np.sqrt(variance + eps)
    if lost.any():
        values = v.flatten(0, 2)[:, torch.from_numpy(lost)].double()
        values = F.relu(values) if act else F.gelu(values)
        found[:, torch.from_numpy(lost)] = torch.stack(torch.var_mean(values, 0, correction=0)[::-1])
    return found


def norm_gradients(
    weight: Tensor, statistics: Tensor, sums: Tensor, count: int, eps: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a norm's backward coefficients a, b, c, fp32 (3, C), and the gradients of its weight and bias.

    The gradient of v, from the gradient g of norm(act(v)), is (a * g + b * act(v) + c) * act'(v).

    Args:
        weight: (C,).
        statistics: The mean and variance that the norm used, float64 (2, C).
        sums: Sums of g and of g * act(v), float64 (2, C).
        count: Number of values in each sum.
        eps: Epsilon of BatchNorm.
        training: Whether the statistics depend on the input.

    Source: arXiv 1502.03167, Sec. 3.
    """
    (mean, variance), (bias_grad, product) = statistics, sums
    rstd = torch.rsqrt(variance + eps)
    weight_grad = rstd * (product - mean * bias_grad)
    a = weight * rstd
    b = -a * rstd * weight_grad / count if training else torch.zeros_like(a)
    c = -a * bias_grad / count - b * mean if training else b
    return torch.stack((a, b, c)).float(), weight_grad.float(), bias_grad.float()


def _forward(
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
    statistics: list[Tensor] = []

    def norm(v: Tensor, weight: Tensor, bias: Tensor, sums: Tensor | None) -> Tensor:
        i = 2 * len(statistics)
        used = statistics_of(sums, v, running[i : i + 2], eps, act)
        statistics.append(used)
        return scale_shift(weight, bias, used, eps)

    kept: list[Tensor] = []
    taken: list[Tensor] = []
    sums = _kernels.act_statistics(v, act) if training else None
    before, norm_before = v, norm(v, parameters[0], parameters[1], sums)
    for i in range(2, len(parameters), PER_BLOCK):
        taken += [_kernels.act_norm(before, norm_before, act)] if (i - 2) // PER_BLOCK in take else []
        dw, dw_bias, weight_1, bias_1, pw, pw_bias, weight_2, bias_2 = parameters[i : i + PER_BLOCK]
        u, sums = _kernels.spatial_forward(before, norm_before, dw, dw_bias, act, training)
        norm_u = norm(u, weight_1, bias_1, sums if training else None)
        matrix = pw.flatten(1).to(v.dtype)
        after, sums = _kernels.channel_forward(u, norm_u, before, norm_before, matrix, pw_bias, act, training)
        before, norm_before = after, norm(after, weight_2, bias_2, sums if training else None)
        kept += [u, after] if keep else []
    taken += [_kernels.act_norm(before, norm_before, act)] if len(parameters) // PER_BLOCK in take else []
    y = (_kernels.act_norm_pool if pool else _kernels.act_norm)(before, norm_before, act)
    return y, [*taken, *kept, torch.stack(statistics)]


def _backward(
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
    count = v.numel() // v.shape[3]
    *kept, statistics = kept
    outputs = [v, *kept[1::2]]
    given = dict(zip(take, taken_grads, strict=True))

    def with_taken(grad: Tensor, sums: Tensor, after: int) -> Tensor:
        """Add the gradient of the features taken after `after` blocks, if any, to `grad`; return the new sums."""
        if after not in given:
            return sums
        taken = given[after].to(grad.dtype).contiguous()
        grad += taken
        return sums + _kernels.act_products(taken, outputs[after], act)

    if pool:
        grad, sums = _kernels.act_norm_pool_backward(grad.float().contiguous(), outputs[-1], act)
    else:
        grad = grad.to(v.dtype, copy=True).contiguous()  # the kernels below write into it
        sums = _kernels.act_products(grad, outputs[-1], act)
    sums = with_taken(grad, sums, len(kept) // 2)
    gradients: list[Tensor] = []
    for block in reversed(range(len(kept) // 2)):
        i = 2 + PER_BLOCK * block
        dw, _, weight_1, bias_1, pw, _, weight_2, _ = parameters[i : i + PER_BLOCK]
        weight_0, bias_0 = parameters[i - 2 : i]
        u, before = kept[2 * block], outputs[block]
        norm_before = scale_shift(weight_0, bias_0, statistics[2 * block], eps)
        norm_u = scale_shift(weight_1, bias_1, statistics[2 * block + 1], eps)
        back, *norm_2 = norm_gradients(weight_2, statistics[2 * block + 2], sums, count, eps, training)
        pw_grad, pw_bias, sums = _kernels.channel_backward(
            grad, outputs[block + 1], back, u, norm_u, before, norm_before, pw.flatten(1).to(v.dtype), act
        )
        back, *norm_1 = norm_gradients(weight_1, statistics[2 * block + 1], sums, count, eps, training)
        dw_grad, dw_bias, sums = _kernels.spatial_backward(grad, u, back, before, norm_before, dw, act)
        sums = with_taken(grad, sums, block)
        pointwise = [pw_grad.view_as(pw), pw_bias[0].float()]
        gradients = [dw_grad, dw_bias[0].float(), *norm_1, *pointwise, *norm_2, *gradients]
    back, *norm_0 = norm_gradients(parameters[0], statistics[0], sums, count, eps, training)
    _kernels.act_norm_backward(grad, v, back, act)
    return grad, [*norm_0, *gradients]


LIBRARY.impl("blocks", _forward, "CPU")
LIBRARY.impl("blocks_backward", _backward, "CPU")


@torch.library.register_fake("convmixer::blocks")
def _(
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
    N, _, _, C = v.shape
    norms = (len(parameters) - 2) // PER_BLOCK * 2 + 1
    kept = [torch.empty_like(v) for _ in range(len(take) + (norms - 1) * keep)]
    y = v.new_empty((N, C), dtype=torch.float32) if pool else torch.empty_like(v)
    return y, [*kept, v.new_empty((norms, 2, C), dtype=torch.float64)]


@torch.library.register_fake("convmixer::blocks_backward")
def _(
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
    return torch.empty_like(v), [torch.empty_like(p) for p in parameters]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    v, parameters, running, eps, act, training, pool, take, keep = inputs
    assert keep
    ctx.settings, ctx.pool, ctx.take = (eps, act, training), pool, list(take)
    ctx.counts = len(parameters), len(running)
    ctx.save_for_backward(v, *parameters, *output[1][len(take) :])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, more: list[Tensor | None]) -> tuple[Any, ...]:
    n_parameters, n_running = ctx.counts
    of_take: Any = None if ctx.take else []  # torch mistakes an empty list of numbers for one of tensors
    rest = [None] * n_running, None, None, None, None, of_take, None
    given = [(after, taken) for after, taken in zip(ctx.take, more, strict=False) if taken is not None]
    v, *tensors = ctx.saved_tensors
    parameters, (*kept, statistics) = tensors[:n_parameters], tensors[n_parameters:]
    blocks, pool = len(kept) // 2, ctx.pool
    if grad is None:  # later blocks than those of `given` get None: with zeros, an optimizer would still update them
        if not given:
            return None, [None] * n_parameters, *rest
        (blocks, grad), pool = given.pop(), False
    used = parameters[: 2 + PER_BLOCK * blocks]
    kept = [*kept[: 2 * blocks], statistics[: 2 * blocks + 1]]
    take, taken_grads = [after for after, _ in given], [taken for _, taken in given]
    v_grad, gradients = _kernels.blocks_backward(grad, v, used, kept, *ctx.settings, pool, take, taken_grads)
    return v_grad, [*gradients, *[None] * (n_parameters - len(used))], *rest


torch.library.register_autograd("convmixer::blocks", _differentiate, setup_context=_keep)
torch.library.register_autograd("convmixer::blocks_backward", differentiable_once)


def _block_flops(v: Any, parameters: list[Any]) -> int:
    """Return the FLOPs of all depthwise and pointwise convolutions: twice their multiply-accumulates."""
    N, H, W, _ = v
    weights = [shape for shape in parameters if len(shape) == 4]
    return 2 * N * H * W * sum(math.prod(shape) for shape in weights)


@register_flop_formula(torch.ops.convmixer.blocks)
def _(v: Any, parameters: list[Any], *_: Any, **__: Any) -> int:
    return _block_flops(v, parameters)


@register_flop_formula(torch.ops.convmixer.blocks_backward)
def _(grad: Any, v: Any, parameters: list[Any], *_: Any, **__: Any) -> int:
    return 2 * _block_flops(v, parameters)  # the gradients of the input and of the weights
