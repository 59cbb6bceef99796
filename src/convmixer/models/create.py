"""Creates models by name, with or without released weights."""

from typing import Any

import torch.nn as nn

from convmixer.errors import RequestError
from convmixer.models.reading import check_shapes
from convmixer.models.registry import SKELETONS, build_model, model_args
from convmixer.models.weights import adapt_channels, load_model


def create_model(
    name: str, pretrained: bool = False, num_classes: int | None = None, in_chans: int = 3, **kwargs: Any
) -> nn.Module:
    """Return a new model that maps (B, in_chans, H, W) to (B, num_classes).

    Args:
        name: A name from `list_models`, any `convmixer_<dim>_<depth>_p<p>_k<k>`, or a name that timm knows.
        pretrained: Load the released weights (from the package or timm's hub).
        num_classes: Outputs; None: the variant's default (1000, or 10 for the CIFAR sizes).
        in_chans: Channels of the image.
        **kwargs: Further arguments of the model, e.g. act="relu", or img_size=32 for timm's ViT.

    Raises:
        RequestError: The name is not known, the model has no such argument, or it has no released weights.
    """
    if pretrained and name in SKELETONS:
        raise RequestError(f"{name} has no released weights")
    if pretrained and model_args(name) is None:
        return build_model(name, num_classes, in_chans, pretrained=True, **kwargs)
    model = build_model(name, num_classes, in_chans, **kwargs)
    if pretrained:
        load_pretrained(model, name)
    return model


def load_pretrained(model: nn.Module, name: str) -> None:
    """Load the released weights of a name into a ConvMixer, from the package or timm's hub.

    If the number of classes differs, the classifier keeps its random weights. If the number of channels differs, the
    weights of the stem are adapted.

    Raises:
        RequestError: No weights of that name are released, the hub cannot be reached, or the sizes differ.
    """
    loaded = load_model(name)
    state = loaded.model.state_dict()
    own = model.state_dict()
    heads = [{k: v for k, v in s.items() if k.startswith("head.")} for s in (own, state)]
    if {k: v.shape for k, v in heads[0].items()} != {k: v.shape for k, v in heads[1].items()}:
        state = {k: v for k, v in state.items() if k not in heads[1]} | heads[0]
    state["stem.0.weight"] = adapt_channels(state["stem.0.weight"], own["stem.0.weight"].shape[1])
    check_shapes(state, own, loaded.source)
    model.load_state_dict(state)
