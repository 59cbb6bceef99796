"""ConvMixer: the model, its exact recipes, and everything to train, compare and deploy it.

Importing the package is fast: a name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from convmixer._version import __version__ as __version__

if TYPE_CHECKING:
    from convmixer.config import Config
    from convmixer.estimator import ConvMixerClassifier
    from convmixer.fast.inference import optimize_for_inference
    from convmixer.inference import load_classifier
    from convmixer.models.convmixer import ConvMixer
    from convmixer.models.create import create_model
    from convmixer.models.registry import list_models
    from convmixer.models.weights import load_model, save_model

__all__ = [
    "Config",
    "ConvMixer",
    "ConvMixerClassifier",
    "create_model",
    "list_models",
    "load_classifier",
    "load_model",
    "optimize_for_inference",
    "save_model",
]

_HOMES = {
    "Config": "convmixer.config",
    "ConvMixer": "convmixer.models.convmixer",
    "ConvMixerClassifier": "convmixer.estimator",
    "create_model": "convmixer.models.create",
    "list_models": "convmixer.models.registry",
    "load_classifier": "convmixer.inference",
    "load_model": "convmixer.models.weights",
    "save_model": "convmixer.models.weights",
    "optimize_for_inference": "convmixer.fast.inference",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'convmixer' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
