"""Returns what a model has learned: patch filters, depthwise kernels, their size and structure, receptive field."""

import re

import numpy as np
import torch
import torch.nn as nn

from convmixer.models.convmixer import ConvMixer


def patch_filters(model: nn.Module) -> np.ndarray | None:
    """Return the weights of the first convolution, (dim, channels, p, p), or None if there is none."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return None if first is None else _array(first)


def depthwise_kernels(model: nn.Module) -> dict[str, np.ndarray]:
    """Return the depthwise kernels by layer, first to last: name -> (dim, k, k); 1x1 kernels are left out."""
    return {
        _short(name): _array(m)[:, 0]
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
        and m.groups == m.in_channels == m.out_channels > 1
        and min(m.kernel_size) > 1
        and m.kernel_size[0] == m.kernel_size[1]
    }


def kernel_growth(model: nn.Module) -> dict[str, dict[str, float]]:
    """Return the size of the kernels of each depthwise layer.

    Returns:
        Layer -> "norm" and "radius". "norm" is the root mean square over channels of the kernels' Euclidean norms.
        "radius", in patches, is the root mean square distance of the weights from the kernel's centre, where each
        weight counts by its square.
    """
    growth = {}
    for name, kernels in depthwise_kernels(model).items():
        k = kernels.shape[1]
        offset = np.arange(k) - (k - 1) / 2
        distance = offset[:, None] ** 2 + offset[None] ** 2
        energy = (kernels.astype(np.float64) ** 2).mean(0)
        total = float(energy.sum())
        radius = float((energy * distance).sum() / total) ** 0.5 if total else 0.0
        growth[name] = {"norm": total**0.5, "radius": radius}
    return growth


def kernel_structure(model: nn.Module) -> float | None:
    """Return how alike neighbouring weights of the depthwise kernels are: about 0 for random kernels, at most 1.

    For each kernel, less its mean, this is the mean product of two weights that are next to each other in a row or
    column, divided by the mean square. Independent weights give -1 / (k² - 1) on average, which is subtracted.

    Returns:
        The mean over all kernels of all layers, or None if the model has no depthwise kernels.

    Source: Moran's I (Moran 1950, Notes on continuous stochastic phenomena), less its expectation; its use here is
        ours.
    """
    found = []
    for kernels in depthwise_kernels(model).values():
        centred = kernels.astype(np.float64) - kernels.mean((1, 2), dtype=np.float64, keepdims=True)
        square = (centred**2).mean((1, 2))
        rows, columns = centred[:, :, 1:] * centred[:, :, :-1], centred[:, 1:] * centred[:, :-1]
        product = (rows.mean((1, 2)) + columns.mean((1, 2))) / 2
        found.append(product / np.maximum(square, 1e-30) + 1 / (kernels[0].size - 1))
    return float(np.concatenate(found).mean()) if found else None


def receptive_field(model: ConvMixer, images: torch.Tensor, seed: int = 0) -> dict[str, np.ndarray]:
    """Return how strongly each pixel affects the features in the middle of the image, after some of the blocks.

    Args:
        model: A ConvMixer in eval mode.
        images: Preprocessed images, (B, C, H, W).
        seed: Seed of the random directions in feature space.

    Returns:
        Name -> (H, W), the mean absolute gradient over images and channels, scaled to a maximum of 1.

    Source: arXiv 1701.04128, Sec. 3; random directions instead of the sum over channels, which cancels. Ours.
    """
    depths = sorted({0, (model.depth - 1) // 2, model.depth - 1})
    images = images.clone().requires_grad_()
    features = model.forward_intermediates(images, depths, intermediates_only=True)
    assert isinstance(features, list)
    generator = torch.Generator().manual_seed(seed)
    fields = {}
    for depth, feature in zip(depths, features, strict=True):
        middle = feature[:, :, feature.shape[2] // 2, feature.shape[3] // 2]  # (B, dim)
        direction = torch.randn(middle.shape, generator=generator)
        (gradient,) = torch.autograd.grad((middle * direction).sum(), images, retain_graph=True)
        field = gradient.abs().mean((0, 1)).numpy()
        fields[f"after block {depth + 1}"] = field / max(float(field.max()), 1e-30)
    return fields


def _array(conv: nn.Conv2d) -> np.ndarray:
    array: np.ndarray = conv.weight.detach().float().cpu().numpy()
    return array


def _short(name: str) -> str:
    match = re.match(r"blocks\.(\d+)\.", name)
    return f"block {int(match[1]) + 1}" if match else name
