"""Class-activation maps of a ConvMixer: exact, because only a mean and a linear layer follow the features."""

import contextlib
from typing import cast

import torch
import torch.nn as nn

from convmixer.models.convmixer import ConvMixer

TOP = 5


def has_maps(model: nn.Module) -> bool:
    """Return whether a model has exact maps: it is a ConvMixer that classifies the mean of its features."""
    return isinstance(model, ConvMixer) and isinstance(model.head, nn.Linear) and model.global_pool == "avg"


class WithMaps(nn.Module):
    """A ConvMixer that also returns class-activation maps: images (B, C, H, W) -> (logits, maps).

    maps is (B, k, h, w) for the k = min(5, classes) likeliest classes in descending order. The mean of a map plus the
    class's bias is the class's logit, so a map says how much each patch adds to it.

    Args:
        model: A ConvMixer with a classifier; parameters are shared, not copied.

    Source: class-activation maps, arXiv 1512.04150, Sec. 2, Eq. 2; for ConvMixer's head, ours.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        model = cast(ConvMixer, self.model)
        features = model.forward_features(images)  # (B, D, h, w)
        kind = images.device.type
        # without autocast: bf16 logits have steps of 1/16, so the logits would differ from those without maps
        plain = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
        with plain:
            features = features.float()
            logits = model.forward_head(features)
            top = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
            weight = cast(nn.Linear, model.head).weight[top]  # (B, k, D)
            maps = torch.matmul(weight, features.flatten(2))  # (B, k, N)
        return logits, maps.unflatten(2, features.shape[2:])
