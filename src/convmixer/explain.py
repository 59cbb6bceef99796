"""Draws where in an image the evidence for a class is, and what a model has learned."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convmixer.errors import RequestError
from convmixer.inference import load_classifier, ranked, softmax
from convmixer.preprocess import MAX_SIDE, Preprocessing, load_image, normalise, resize_and_crop
from convmixer.results import plots
from convmixer.run_folder import RunFolder, is_run, sample_files
from convmixer.text import terminal

SHOWN_SIDE = 448  # side of the drawn photo, pixels


def explain(weights: str, image: Path, out: Path | None = None, topk: int = 5) -> dict[str, Any]:
    """Draw an image next to its class-activation map and likeliest classes, and return them.

    Args:
        weights: See `load_classifier`.
        image: An image file.
        out: The PNG to write; default: `<image>-explained.png` in the current folder.
        topk: Classes to show, at least 1.

    Returns:
        "picture", "classes", "probabilities" and "map". The map has rows of numbers, one per patch: how much the
        patch adds to the logit of the likeliest class. The mean of the map plus the class's bias is the logit. The
        map is None if the model has no exact maps.

    Raises:
        RequestError: The weights or the image cannot be read.
    """
    if topk < 1:
        raise RequestError(f"--topk must be at least 1, not {topk}")
    if not image.is_file():
        raise RequestError(f"{image} is not a file")
    classifier = load_classifier(weights)
    p = classifier.preprocessing
    try:
        photo = load_image(image, p.in_chans, p.bits)
    except ValueError as error:
        raise RequestError(str(error)) from error
    seen = resize_and_crop(photo, p)
    logits, maps = classifier.explained(normalise(seen, p)[None])
    probabilities = softmax(logits)[0]
    order = ranked(probabilities, topk)
    classes, shares = [classifier.classes[i] for i in order], [float(probabilities[i]) for i in order]
    evidence = None if maps is None else maps[0, 0]
    path = out or Path(f"{image.stem}-explained.png")
    plots.explanation(*_panels(photo, seen, p), evidence, classes, shares, path)
    print("\n".join(f"{100 * share:5.1f}%  {terminal(name)}" for name, share in zip(classes, shares, strict=True)))
    print(f"picture: {terminal(path)}")
    rows = None if evidence is None else evidence.round(5).tolist()
    return {"picture": str(path), "classes": classes, "probabilities": shares, "map": rows}


def _panels(photo: Image.Image, seen: Image.Image, p: Preprocessing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the photo at screen size, the same cropped as for the network, and the network's input, all 0 to 1."""
    whole = photo.copy()
    whole.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    side = min(SHOWN_SIDE, int(2 * MAX_SIDE * p.crop_pct))  # the largest size that Preprocessing allows
    framed = resize_and_crop(photo, replace(p, img_size=side)) if p.img_size < side else seen
    return np.asarray(whole) / 255, np.asarray(framed) / 255, np.asarray(seen) / 255


def plot(weights: str, out: Path | None = None) -> dict[str, Any]:
    """Draw what a model has learned: patch filters, depthwise kernels, their growth, the effective receptive field.

    Args:
        weights: A run folder, or anything else that `load_model` takes; growth over training needs a run.
        out: Folder for the pictures; default: the run's `pictures`, else `pictures` in the current folder.

    Returns:
        "pictures": the files written.

    Raises:
        RequestError: The weights cannot be loaded, or there is nothing in them to draw.
    """
    from convmixer.models import inspection
    from convmixer.models.weights import load_model

    loaded = load_model(weights)
    run = RunFolder(weights)
    folder = out or (run.pictures if is_run(weights) else Path("pictures"))
    written: list[Path] = []

    def target(name: str) -> Path:
        written.append(folder / f"{name}.png")
        return written[-1]

    filters, kernels = inspection.patch_filters(loaded.model), inspection.depthwise_kernels(loaded.model)
    if filters is not None:
        plots.patch_filters(filters, target("patch_embedding"))
    if kernels:
        plots.depthwise_kernels(kernels, target("depthwise_kernels"))
    rows = read_growth(run.log_file)
    if rows:
        plots.kernel_growth(rows, target("kernel_growth"))
    if isinstance(loaded.model, inspection.ConvMixer):
        fields = inspection.receptive_field(loaded.model, _probe(weights, loaded.preprocessing))
        plots.receptive_field(fields, target("receptive_field"))
    if not written:
        raise RequestError(f"{weights}: {type(loaded.model).__name__} has no convolutions to draw")
    print("\n".join(map(str, written)))
    return {"pictures": [str(path) for path in written]}


def read_growth(log: Path) -> list[dict[str, Any]]:
    """Return "epoch" and "layers" (see `inspection.kernel_growth`) of each epoch in a run's log, if there is one."""
    if not log.is_file():
        return []
    rows = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            e = json.loads(line)
            if e["event"] == "epoch" and e.get("kernels"):
                rows.append({"epoch": e["epoch"], "layers": e["kernels"]})
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a kill
    return rows


def _probe(weights: str, p: Any) -> Any:
    """Return the images for the receptive field: the samples saved with the weights, else random noise."""
    import torch

    from convmixer.preprocess import preprocess

    files = sample_files(weights)
    if files:
        return torch.from_numpy(np.stack([preprocess(load_image(file, p.in_chans, p.bits), p) for file in files]))
    return torch.randn(8, p.in_chans, p.img_size, p.img_size, generator=torch.Generator().manual_seed(0))
