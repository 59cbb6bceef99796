"""The kernels of a block as torch ops: their schemas, and the fake kernels of all but two ops.

The fake kernels and autograd of these two, `blocks` and `blocks_backward`, are in kernels/blocks.py. The CPU code is
built on first use.

Activations are (N, H, W, C), contiguous, fp32, bf16 or, on CUDA, fp16. The pointwise matrix has the dtype of the
activations; all other parameters are fp32. Sums are fp32 or wider.
Before using an op on a CPU, call `convmixer.kernels.available()`: it builds and loads the code. On CUDA, call
`convmixer.kernels.cuda.why_not`.
"""

from typing import Any

import torch
from torch import Tensor

SCHEMAS = (
    # The two halves of a block, and the passes at both ends of the network (act_...), see cpu/csrc/channels.h. A norm
    # is given as scale and shift, (2, C), or, to an op that computes the gradient through it, as a, b, c of
    # channels.h, (3, C).
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
    # All blocks at once, see blocks.py.
    "blocks(Tensor v, Tensor[] parameters, Tensor[] running, float eps, int act, bool training, bool pool,"
    " int[] take, bool keep) -> (Tensor, Tensor[])",
    "blocks_backward(Tensor grad, Tensor v, Tensor[] parameters, Tensor[] kept, float eps, int act, bool training,"
    " bool pool, int[] take, Tensor[] taken_grads) -> (Tensor, Tensor[])",
)
LIBRARY = torch.library.Library("convmixer", "DEF")


def _refuse_batches(*_: Any) -> Any:
    """Raise an error that says what to do; without this, torch's error would only name the op."""
    raise RuntimeError("the kernels do not run with is_grads_batched: CONVMIXER_KERNELS=0 runs plain PyTorch")


for _schema in SCHEMAS:
    LIBRARY.define(_schema)
    LIBRARY.impl(_schema.partition("(")[0], _refuse_batches, "Batched")


def differentiable_once(ctx: Any, *gradients: Any) -> Any:
    """Raise an error if a gradient is differentiated again; without this, torch would return zero."""
    raise RuntimeError("the kernels have no second derivatives: CONVMIXER_KERNELS=0 runs plain PyTorch")


def _sums(v: Tensor, rows: int = 2) -> Tensor:
    return v.new_empty((rows, v.shape[3]), dtype=torch.float64)


@torch.library.register_fake("convmixer::spatial_forward")
def _(
    before: Tensor, norm: Tensor, weight: Tensor, bias: Tensor, act: int, statistics: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(before), _sums(before)


@torch.library.register_fake("convmixer::spatial_backward")
def _(
    grad: Tensor, u: Tensor, norm: Tensor, before: Tensor, norm_before: Tensor, weight: Tensor, act: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(weight), _sums(grad, 1), _sums(grad)


@torch.library.register_fake("convmixer::channel_forward")
def _(
    u: Tensor,
    norm: Tensor,
    before: Tensor,
    norm_before: Tensor,
    weight: Tensor,
    bias: Tensor,
    act: int,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), _sums(u)


@torch.library.register_fake("convmixer::channel_backward")
def _(
    grad: Tensor,
    v: Tensor,
    norm_v: Tensor,
    u: Tensor,
    norm: Tensor,
    before: Tensor,
    norm_before: Tensor,
    weight: Tensor,
    act: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(weight, dtype=torch.float32), _sums(grad, 1), _sums(grad)


@torch.library.register_fake("convmixer::act_statistics")
def _(v: Tensor, act: int) -> Tensor:
    return _sums(v)


@torch.library.register_fake("convmixer::act_products")
def _(grad: Tensor, v: Tensor, act: int) -> Tensor:
    return _sums(v)


@torch.library.register_fake("convmixer::act_norm")
def _(v: Tensor, norm: Tensor, act: int) -> Tensor:
    return torch.empty_like(v)


@torch.library.register_fake("convmixer::act_norm_pool")
def _(v: Tensor, norm: Tensor, act: int) -> Tensor:
    return v.new_empty((v.shape[0], v.shape[3]), dtype=torch.float32)


@torch.library.register_fake("convmixer::act_norm_pool_backward")
def _(grad: Tensor, v: Tensor, act: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), _sums(v)


@torch.library.register_fake("convmixer::act_norm_backward")
def _(grad: Tensor, v: Tensor, norm: Tensor, act: int) -> None:
    return None
