"""Inference of a whole ConvMixer as one op, and the packing of its weights.

Call `convmixer.kernels.available()` before you use an op: it builds and loads the code.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from convmixer.kernels.ops import LIBRARY

PRECISIONS = ("fp32", "bf16", "int8")  # the op's `precision` is the index
VECTORS = ("multiply", "bias", "scale", "shift", "steps", "zero")  # the rows of each `..._vectors` argument of `pack`

LIBRARY.define(
    "pack_network(Tensor stem, Tensor stem_vectors, Tensor depthwise, Tensor depthwise_vectors, Tensor point, "
    "Tensor point_vectors, int precision) -> Tensor"
)
LIBRARY.define(
    "run_network(Tensor images, Tensor weights, int dim, int depth, int k, int patch, int act, int precision)"
    " -> Tensor"
)


def pack(
    stem: Tensor,
    stem_vectors: Tensor,
    depthwise: Tensor,
    depthwise_vectors: Tensor,
    point: Tensor,
    point_vectors: Tensor,
    precision: str,
) -> Tensor:
    """Return the weights of a network in the order that this machine's kernel reads them.

    The kernel computes act(sum * multiply + bias) * scale + shift for every sum, with the vectors that `VECTORS`
    names. `multiply`, `steps` and `zero` are used only for the matrix multiplications of int8; elsewhere `multiply`
    counts as 1. A value z enters these multiplications as round(z * steps + zero), 0 to 255, with the `steps` and
    `zero` of `depthwise_vectors`.

    Args:
        stem: (dim, in_chans, patch, patch), fp32 like the other arguments.
        stem_vectors: (6, dim).
        depthwise: (depth, dim, k, k).
        depthwise_vectors: (depth, 6, dim).
        point: (depth, dim, dim); for int8 whole numbers up to `build.largest_int8_weight`.
        point_vectors: (depth, 6, dim).
        precision: One of `PRECISIONS`.

    Returns:
        The packed weights, int32; only `run` on this machine can read them.
    """
    parts = (stem, stem_vectors, depthwise, depthwise_vectors, point, point_vectors)
    floats = [part.detach().float().contiguous() for part in parts]
    packed: Tensor = torch.ops.convmixer.pack_network(*floats, PRECISIONS.index(precision))
    return packed


def run(
    images: Tensor, weights: Tensor, dim: int, depth: int, k: int, patch: int, act: int, precision: str
) -> Tensor:
    """Return the pooled features of images, (B, dim) fp32.

    Each thread computes one image from the stem to the pool. If fewer images are left than there are threads, all
    threads work on the same image, each on some of its rows, and then on the next image.

    Args:
        images: (B, in_chans, H, W), fp32.
        weights: The result of `pack`.
        dim, depth, k, patch: The network's sizes.
        act: 0 for GELU, 1 for ReLU.
        precision: The precision that the weights were packed for.
    """
    code = PRECISIONS.index(precision)
    pooled: Tensor = torch.ops.convmixer.run_network(images.contiguous(), weights, dim, depth, k, patch, act, code)
    return pooled


@torch.library.register_fake("convmixer::run_network")
def _(images: Tensor, weights: Tensor, dim: int, depth: int, k: int, patch: int, act: int, precision: int) -> Tensor:
    return images.new_empty((images.shape[0], dim))


@torch.library.register_vmap("convmixer::run_network")
def _(info: Any, in_dims: tuple[Any, ...], images: Tensor, weights: Tensor, *settings: int) -> tuple[Tensor, int]:
    """Apply `vmap`: compute (V, B, C, H, W) as one batch, and return (V, B, dim)."""
    if in_dims[0] is None or in_dims[1] is not None:
        raise NotImplementedError("vmap over the weights of an optimised model")
    images = images.movedim(in_dims[0], 0)
    pooled: Tensor = torch.ops.convmixer.run_network(images.flatten(0, 1).contiguous(), weights, *settings)
    return pooled.unflatten(0, images.shape[:2]), 0


@register_flop_formula(torch.ops.convmixer.run_network)
def _(images: Any, weights: Any, dim: int, depth: int, k: int, patch: int, *_: Any, **__: Any) -> int:
    B, C, H, W = images
    return 2 * B * (H // patch) * (W // patch) * dim * (C * patch**2 + depth * (k**2 + dim))
