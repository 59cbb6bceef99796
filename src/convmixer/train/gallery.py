"""Pictures and sample files of a run: augmented images, learned filters, curves, mistakes."""

import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from convmixer.data.datasets import DataSplits
from convmixer.data.transforms import erase, mix
from convmixer.files import atomic_file
from convmixer.models import inspection
from convmixer.results import plots
from convmixer.results.mistakes import MOST_PICTURES, SIDE, write_mistakes
from convmixer.results.page import thumbnail
from convmixer.train.scores import Scores
from convmixer.train.setup import Job

SHOWN = 32
REHEARSED = 8  # images that are read to measure how long the page of mistakes takes
MISTAKES_SECONDS = 5.0  # limit for reading the images of the page of mistakes


def augmented(job: Job, path: Path) -> None:
    """Draw the first images of the first step as the model gets them, labelled with their targets."""
    images, labels, *_ = (t.cpu() for t in next(iter(job.train_loader(workers=0))))
    generator = torch.Generator().manual_seed(0)
    images, targets = mix(images, labels, len(job.data.classes), job.config, generator)
    images = erase(images, job.config, generator)
    p = job.preprocessing
    mean, std = (torch.tensor(values)[:, None, None] for values in (p.mean, p.std))
    pixels = (images[:SHOWN] * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
    titles = [_title(target, job.data.classes) for target in targets[:SHOWN]]
    plots.image_grid(
        pixels.squeeze(-1) if pixels.shape[3] == 1 else pixels, titles, path, "Training images, augmented"
    )


def samples(data: DataSplits, folder: Path, most: int = 10) -> None:
    """Write one test image of each of the first `most` classes as a PNG file, to try `predict` on."""
    images = data.test or data.val or data.train
    assert images is not None
    for label, name in list(enumerate(data.classes))[:most]:
        for index in np.flatnonzero(images.labels == label)[:1]:
            found = images.read(int(index))
            if found:
                safe = re.sub(r"[^\w.-]+", "_", str(name))
                with atomic_file(folder / f"{label:02d}_{safe}.png") as file:
                    found[0].save(file, format="PNG")


def results(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    steps: Sequence[dict[str, Any]],
    model: nn.Module,
    found: Scores | None,
    classes: Sequence[str],
) -> None:
    """Draw the curves, the confusion matrix, the patch filters and the depthwise kernels."""
    plots.curves(rows, folder / "curves.png", steps)
    if found:
        plots.confusion_matrix(found.confusion, list(classes), folder / "confusion_matrix.png")
    filters, kernels = inspection.patch_filters(model), inspection.depthwise_kernels(model)
    if filters is not None:
        plots.patch_filters(filters, folder / "patch_embedding.png")
    if kernels:
        plots.depthwise_kernels(kernels, folder / "depthwise_kernels.png")


def mistakes(data: DataSplits, split: str, found: Scores | None, path: Path) -> None:
    """Write the page of mistakes on a split if `found` has the answers; images are read for a few seconds at most."""
    images = getattr(data, split)
    if found and found.answers is not None and len(found.answers):
        about = f"The chosen weights of this run on the {split} split of {data.name}."
        write_mistakes(path, found.answers, data.classes, images.picture, images.name, about, MISTAKES_SECONDS)


def rehearse(
    job: Job, rows: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]], model: nn.Module, found: Scores | None
) -> float:
    """Return the seconds that the pictures and the page of mistakes take, drawn into a folder that is then deleted.

    For the page a few images are read, not as many as it shows.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results(Path(folder), rows, steps, model, found, job.data.classes)
    drawn = time.perf_counter()
    images = job.data.test if job.config.test and job.data.test else job.data.val
    if not images:
        return drawn - began
    places = range(min(REHEARSED, len(images)))
    for place in places:
        if (picture := images.picture(place)) is not None:
            thumbnail(picture, "", SIDE)
    reading = (time.perf_counter() - drawn) / len(places) * min(len(images), MOST_PICTURES)
    return drawn - began + min(reading, MISTAKES_SECONDS)


def _title(target: torch.Tensor, classes: Sequence[str]) -> str:
    share, labels = target.topk(min(2, len(classes)))
    if len(labels) > 1 and share[1] > 0.15:
        return f"{classes[int(labels[0])]} + {classes[int(labels[1])]}"
    return str(classes[int(labels[0])])
