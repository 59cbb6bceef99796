"""Initial weights that help short runs: a whitening stem, a classifier of zeros."""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn as nn

from convmixer.config import Config
from convmixer.data.images import ImageSet
from convmixer.data.loader import eval_loader
from convmixer.data.transforms import eval_transform
from convmixer.errors import RequestError
from convmixer.preprocess import Preprocessing

WHITEN_IMAGES = 5000
WHITEN_EPS = 5e-4  # added to the variances, so that directions of pure noise are not amplified


def initialize(model: nn.Module, config: Config, images: ImageSet, p: Preprocessing) -> None:
    """Set the weights that `stem_init` and `head_init` ask for, in place.

    Args:
        model: A new model, or one with a new classifier.
        config: Its settings `stem_init`, `head_init` and `seed` are used.
        images: The training images.
        p: Their preprocessing.

    Raises:
        RequestError: The model's first layer is not a convolution without padding.
    """
    if config.stem_init == "whiten":
        order = np.random.default_rng(config.seed).permutation(len(images))[:WHITEN_IMAGES]
        loader = eval_loader(images.subset(np.sort(order)), eval_transform(p), 500)
        whiten_stem(model, (batch for batch, _ in loader))
    if config.head_init == "zeros":
        for parameter in model.get_classifier().parameters():  # type: ignore[operator]
            nn.init.zeros_(parameter)


@torch.no_grad()
def whiten_stem(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Replace filters of a model's first convolution by ones whose responses to patches are uncorrelated (whitening).

    The new filters are the eigenvectors of the matrix of second moments of the patches, divided by the roots of the
    eigenvalues. Their negatives are filters too, because the activation that follows cuts off one side. With D values
    in a patch there are 2D of them. If the layer has fewer filters, it gets those with the largest eigenvalues; if it
    has more, the others keep their initial weights. All filters are trained afterwards.

    Args:
        model: A model whose first convolution has no padding, such as a patch embedding.
        batches: Preprocessed images (B, C, H, W).

    Raises:
        RequestError: The first convolution has padding, or there is none.

    Source: arXiv 2404.00498, Sec. 3.1, where the filters are frozen; here they are not.
    """
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.groups != 1 or any(first.padding if isinstance(first.padding, tuple) else (1,)):
        raise RequestError("stem_init whiten needs a model that begins with a convolution without padding")
    moments, count = torch.zeros(()), 0
    for images in batches:
        patches = nn.functional.unfold(images, first.kernel_size, first.dilation, 0, first.stride)  # (B, D, N)
        flat = patches.transpose(1, 2).flatten(0, 1).double()
        moments, count = moments + flat.T @ flat, count + len(flat)
    values, vectors = torch.linalg.eigh(moments / count)
    filters = (vectors / (values + WHITEN_EPS).sqrt()).T.flip(0)  # the largest eigenvalue first
    signed = torch.stack([filters, -filters], 1).flatten(0, 1)[: first.out_channels]
    first.weight[: len(signed)] = signed.reshape(-1, *first.weight.shape[1:]).to(first.weight)
