"""`Source`: a model as a function of images alone, and the facts that are stored with it in an export."""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from convmixer.models.maps import WithMaps, has_maps
from convmixer.preprocess import Preprocessing


@dataclass(frozen=True)
class Source:
    """A model to write to a file; the modules of all formats start from it.

    Args:
        model: Maps images (B, C, H, W) to a tuple of outputs; float32, on the CPU, in eval mode.
        outputs: Names of the outputs: "logits", and "maps" if the model has exact class-activation maps.
        classes: Class names in the order of the logits.
        preprocessing: How an image becomes the input.
        about: Further facts to store, JSON values.
        precision: "fp32", "fp16" or "int8".
        calibration: For int8: batches (B, C, H, W) float32 of training images.
        pictures: PNG or JPEG files that a page offers.
    """

    model: nn.Module
    outputs: tuple[str, ...]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    about: dict[str, Any]
    precision: str
    calibration: Sequence[np.ndarray]
    pictures: Sequence[bytes]

    @property
    def texts(self) -> dict[str, str]:
        """The metadata that `load.py` reads: name -> JSON text."""
        facts = {"classes": self.classes, "preprocessing": asdict(self.preprocessing), "about": self.about}
        return {name: json.dumps(value) for name, value in facts.items()}

    @property
    def example(self) -> torch.Tensor:
        """Two images of zeros; with a single one, the exporters would assume a fixed batch size."""
        p = self.preprocessing
        return torch.zeros(2, p.in_chans, p.img_size, p.img_size)


class _Logits(nn.Module):
    """Gives every model the same input name and output form: images -> (logits,)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model(images),)


def prepared(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy of a model as `Source.model` needs it, and the names of its outputs."""
    model = copy.deepcopy(model).eval().float().cpu()
    if has_maps(model):
        return WithMaps(model).eval(), ("logits", "maps")
    return _Logits(model).eval(), ("logits",)
