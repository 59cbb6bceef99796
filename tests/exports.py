"""A model fitted to a few real scans in a second, and its exports, each made when a test first asks for it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convmixer.exported.check import Images
from convmixer.exported.export import export_model
from convmixer.exported.formats import FORMATS
from convmixer.models.create import create_model
from convmixer.preprocess import Preprocessing, preprocess
from shared import once

CLASSES = tuple(f"digit {number}" for number in range(10))
P = Preprocessing(img_size=16, in_chans=1, mean=(0.3,), std=(0.3,))
ALL = [(row.name, precision) for row in FORMATS.values() if not row.folder for precision in row.precisions]
ALL.append(("web", "int8"))  # a web folder holds the ONNX file
ABOUT = {"architecture": "tiny"}


class Exports:
    """The model in every format, each made once for all workers.

    Args:
        scans: Images to fit the model to and to check the exports on.
        factory: Gives the folders.
    """

    def __init__(self, scans: Images, factory: pytest.TempPathFactory) -> None:
        self.scans, self._factory = scans, factory
        self.folder = once(factory, "exports", lambda folder: torch.save(fitted(scans), folder / "model.pt"))
        self.model: torch.nn.Module = torch.load(self.folder / "model.pt", weights_only=False)

    def get(self, format: str, precision: str = "fp32") -> tuple[Path, dict[str, Any]]:
        """Return an export's path, not to be changed, and what `export_model` reported of it."""

        def make(folder: Path) -> None:
            made = write(self.model, self.scans, folder, format, precision)
            (folder / "report.json").write_text(json.dumps(made, default=str))

        folder = once(self._factory, f"exports-{format}-{precision}", make)
        path, report = json.loads((folder / "report.json").read_text())
        return Path(path), report

    def write(self, path: Path, format: str = "onnx", precision: str = "fp32") -> dict[str, Any]:
        """Export the model once more."""
        return export_model(self.model, CLASSES, P, self.scans, path, format, precision, ABOUT)


def write(
    model: torch.nn.Module, scans: Images, folder: Path, format: str, precision: str
) -> tuple[Path, dict[str, Any]]:
    """Export a model into its own folder inside `folder`; return the path and what `export_model` reported."""
    path = folder / f"{format}-{precision}" / f"model{FORMATS[format].suffix}"
    return path, export_model(model, CLASSES, P, scans, path, format, precision, ABOUT)


def fitted(scans: Images) -> torch.nn.Module:
    """Return a ConvMixer whose answers are not ties."""
    torch.manual_seed(0)
    model = create_model("convmixer_16_2_p2_k4", num_classes=10, in_chans=1)
    x = torch.from_numpy(np.stack([preprocess(image, P) for image in scans.check]))
    y = torch.from_numpy(scans.labels)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(30):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    with torch.no_grad():
        for _ in range(30):
            model(x)  # settles BatchNorm's running statistics
    return model.eval()
