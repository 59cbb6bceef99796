"""Registers our ConvMixer with timm, so that `timm.create_model("local-dir:FOLDER")` and `hf-hub:` load our weights.

timm itself knows three of the ImageNet sizes. To load any other size, import this module first.
"""

from typing import Any

import torch.nn as nn
from timm.models import build_model_with_cfg, register_model

from convmixer.models.convmixer import ConvMixer

__all__ = ["convmixer"]


@register_model
def convmixer(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a ConvMixer of any size (256/8 with patches of 2 by default), with timm's loading and `features_only`.

    Args:
        pretrained: Load the weights that the `pretrained_cfg` names.
        **kwargs: Arguments of `ConvMixer`, and those that timm passes to every model.
    """
    if "dim" not in kwargs:  # timm builds every registered name without arguments
        kwargs = {"dim": 256, "depth": 8, "patch_size": 2, "kernel_size": 5} | kwargs
    model: nn.Module = build_model_with_cfg(
        ConvMixer, "convmixer", pretrained, feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **kwargs
    )
    return model
