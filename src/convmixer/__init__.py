"""ConvMixer: the model, its exact recipes, and everything to train, compare and deploy it.

Importing this stays light: a name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convmixer.config import Config
    from convmixer.fast_inference import optimize_for_inference
    from convmixer.models.convmixer import ConvMixer
    from convmixer.models.registry import create_model, list_models

__version__ = "0.1.0"

__all__ = ["Config", "ConvMixer", "create_model", "list_models", "optimize_for_inference"]

_HOMES = {
    "Config": "convmixer.config",
    "ConvMixer": "convmixer.models.convmixer",
    "create_model": "convmixer.models.registry",
    "list_models": "convmixer.models.registry",
    "optimize_for_inference": "convmixer.fast_inference",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'convmixer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
