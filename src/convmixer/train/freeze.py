"""Freezes layers of any timm model: all but the classifier, or the stem and the first blocks."""

from typing import cast

import torch.nn as nn

from convmixer.errors import RequestError

ALL = "all"


def freeze(model: nn.Module, what: str | None) -> None:
    """Switch off the gradients of the layers that are to be frozen, in place.

    Args:
        model: A model with timm's interface.
        what: "all": every layer but the classifier. A number N: the stem and the first N blocks. None: no layer.

    Raises:
        RequestError: The model does not name its classifier or its layers, or has fewer blocks.
    """
    kept = _frozen_names(model, what)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in kept)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules that have parameters, all of them frozen."""
    own = list(model.parameters())
    if own and not any(p.requires_grad for p in own):
        return [model]
    return [module for child in model.children() for module in frozen_modules(child)] if own else []


def classifier_of(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return the classifier's name and module, or None unless the model has exactly one."""
    if not hasattr(model, "get_classifier"):
        return None
    found = model.get_classifier()  # type: ignore[operator]
    name = next((name for name, module in model.named_modules() if module is found), "")
    return (name, cast(nn.Module, found)) if name else None


def _frozen_names(model: nn.Module, what: str | None) -> set[str]:
    if what is None:
        return set()
    names = {name for name, _ in model.named_parameters()}
    if what == ALL:
        return names - _classifier_names(model)
    layers, blocks = layers_of(model, "freeze N"), int(what)
    last = max(layers.values())  # the classifier's
    if blocks >= last:
        raise RequestError(f"freeze {blocks}: the model has {last - 1} blocks; freeze {ALL} freezes them all")
    return {name for name in names if layers.get(name, last) <= blocks}


def _classifier_names(model: nn.Module) -> set[str]:
    found = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    parts = found if isinstance(found, (tuple, list)) else [found]
    own = {id(p) for part in parts if isinstance(part, nn.Module) for p in part.parameters()}
    if not own:
        raise RequestError(f"freeze {ALL} needs a model that names its classifier; {type(model).__name__} does not")
    return {name for name, p in model.named_parameters() if id(p) in own}


def layers_of(model: nn.Module, setting: str) -> dict[str, int]:
    """Return parameter name -> number of its layer: 0 is the stem, the last is the classifier.

    Args:
        model: The model.
        setting: The setting that needs the numbers, for the error.

    Raises:
        RequestError: The model does not give the order of its layers.
    """
    if not hasattr(model, "group_matcher"):
        raise RequestError(f"{setting} needs a model that names its layers, which {type(model).__name__} does not")
    from timm.models import group_parameters

    matcher = model.group_matcher(coarse=False)  # type: ignore[operator]
    layers: dict[str, int] = group_parameters(model, matcher, reverse=True)
    return layers
