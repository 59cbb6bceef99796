"""The kernels as torch ops: schema, fake kernel, autograd. The CPU code behind them is built on first use.

Activations are (N, H, W, C), contiguous, fp32 or bf16; weights are fp32. Sums are fp32 or wider.
Call `convmixer.kernels.available()` before using an op: it builds and loads the code.
"""

from typing import Any

import torch
from torch import Tensor

_SCHEMAS = (
    "depthwise(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "depthwise_input_grad(Tensor grad, Tensor weight) -> Tensor",
    "depthwise_weight_grad(Tensor x, Tensor grad, int k) -> Tensor",
    # the halves of a block and its ends, see csrc/block.cpp; `norm` is (2, C) scale and shift, (3, C) for gradients
    "spatial_forward(Tensor before, Tensor norm, Tensor weight, Tensor bias, int act, bool statistics)"
    " -> (Tensor, Tensor)",
    "spatial_backward(Tensor(a!) grad, Tensor u, Tensor norm, Tensor before, Tensor norm_before, Tensor weight,"
    " int act) -> (Tensor, Tensor, Tensor)",
    "channel_forward(Tensor u, Tensor norm, Tensor before, Tensor norm_before, Tensor weight, Tensor bias, int act,"
    " bool statistics) -> (Tensor, Tensor)",
    "channel_backward(Tensor(a!) grad, Tensor v, Tensor norm_v, Tensor u, Tensor norm, Tensor before,"
    " Tensor norm_before, Tensor weight, int act) -> (Tensor, Tensor, Tensor)",
    "act_statistics(Tensor v, int act) -> Tensor",
    "act_products(Tensor grad, Tensor v, int act) -> Tensor",
    "act_norm(Tensor v, Tensor norm, int act) -> Tensor",
    "act_norm_pool(Tensor v, Tensor norm, int act) -> Tensor",
    "act_norm_pool_backward(Tensor grad, Tensor v, int act) -> (Tensor, Tensor)",
    "act_norm_backward(Tensor(a!) grad, Tensor v, Tensor norm, int act) -> ()",
    # all blocks at once, see blocks.py
    "blocks(Tensor v, Tensor[] parameters, Tensor[] running, float eps, int act, bool training, bool pool, bool keep)"
    " -> (Tensor, Tensor[])",
    "blocks_backward(Tensor grad, Tensor v, Tensor[] parameters, Tensor[] kept, float eps, int act, bool training,"
    " bool pool) -> (Tensor, Tensor[])",
)
LIBRARY = torch.library.Library("convmixer", "DEF")
for _schema in _SCHEMAS:
    LIBRARY.define(_schema)


def differentiable_once(ctx: Any, *gradients: Any) -> Any:
    """Refuse the gradient of a gradient, which torch would otherwise take for zero."""
    raise RuntimeError("the CPU kernels are differentiable once: CONVMIXER_KERNELS=0 runs plain PyTorch")


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the depthwise convolution that keeps the image size.

    Args:
        x: (N, C, H, W), fp32 or bf16, any strides; channels-last needs no copy.
        weight: (C, 1, k, k), fp32; k from 1, odd or even.
        bias: (C,), fp32.

    Returns:
        (N, C, H, W) in channels-last, of x's dtype. An even kernel pads one more at the right and the bottom.

    Source: arXiv 2201.09792, Sec. 2, Eq. 2.
    """
    y = torch.ops.convmixer.depthwise(x.permute(0, 2, 3, 1).contiguous(), weight.contiguous(), bias)
    return y.permute(0, 3, 1, 2)


@torch.library.register_fake("convmixer::depthwise")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("convmixer::depthwise_input_grad")
def _(grad: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(grad)


@torch.library.register_fake("convmixer::depthwise_weight_grad")
def _(x: Tensor, grad: Tensor, k: int) -> Tensor:
    return x.new_empty((x.shape[3], 1, k, k), dtype=torch.float32)


def _keep_for_depthwise(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _depthwise_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad = grad.contiguous()
    ops = torch.ops.convmixer
    return (
        ops.depthwise_input_grad(grad, weight) if ctx.needs_input_grad[0] else None,
        ops.depthwise_weight_grad(x, grad, weight.shape[2]) if ctx.needs_input_grad[1] else None,
        grad.sum((0, 1, 2), dtype=torch.float32) if ctx.needs_input_grad[2] else None,
    )


torch.library.register_autograd("convmixer::depthwise", _depthwise_backward, setup_context=_keep_for_depthwise)
for _name in ("depthwise_input_grad", "depthwise_weight_grad"):
    torch.library.register_autograd(f"convmixer::{_name}", differentiable_once)
