"""BatchNorm statistics: checks the stored ones, and computes them again."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from convmixer.data.datasets import DataSplits
from convmixer.data.images import ImageSet
from convmixer.data.loader import eval_loader
from convmixer.data.options import Options
from convmixer.data.transforms import eval_transform
from convmixer.device import choose_device, choose_precision
from convmixer.errors import RequestError
from convmixer.evaluation.data import find_data, match_classes, sample
from convmixer.evaluation.metrics import Batches, collect
from convmixer.models.weights import LoadedModel, load_model, save_changed
from convmixer.preprocess import Preprocessing
from convmixer.progress import track
from convmixer.text import terminal

BN_IMAGES, BN_BATCH = 256, 64  # enough images to notice bad statistics, and few enough to be fast


def batchnorm_disagreement(model: nn.Module, batches: Batches) -> dict[str, Any]:
    """Return a model's accuracy with its stored BatchNorm statistics and with those of each batch.

    If the stored statistics are good, the two accuracies differ little. The stored ones are called bad if the batch's
    own statistics classify more images correctly, by more than 2 points and by more than 3 standard errors of the
    mean paired difference.

    Args:
        model: A module with BatchNorm2d; it is not modified.
        batches: Images in random order, so that each batch has many classes, and labels.

    Returns:
        "stored_top1", "batch_top1" (percent), "n", "bad"; empty if there is no BatchNorm or no image.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return {}
    model = copy.deepcopy(model).eval()
    device = next(model.parameters()).device
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 0.0  # do not change the running statistics
    hits: list[list[torch.Tensor]] = [[], []]
    with torch.inference_mode():
        for images, labels in batches:
            for mode, found in enumerate(hits):
                for norm in norms:
                    norm.train(bool(mode))
                found.append(model(images.to(device)).argmax(1).cpu() == labels)
    if not hits[0]:
        return {}
    stored, batch = (torch.cat(found).double() for found in hits)
    gain, n = float((batch - stored).mean()), len(stored)
    noise = float((batch - stored).std(correction=0)) / math.sqrt(n)
    return {
        "stored_top1": 100 * float(stored.mean()),
        "batch_top1": 100 * float(batch.mean()),
        "n": n,
        "bad": gain > 0.02 and gain > 3 * noise,
    }


def check_batchnorm(
    loaded: LoadedModel, images: ImageSet, index: torch.Tensor, weights: str | Path
) -> tuple[dict[str, Any], list[str]]:
    """Return `batchnorm_disagreement` on a few of the images, and a warning if the statistics are bad.

    Args:
        loaded: The model.
        images: The images that the model is measured on.
        index: Index of the model's output (logit) that belongs to each class of the data.
        weights: Name of the weights, for the warning.
    """
    order = np.random.default_rng(0).permutation(len(images))[:BN_IMAGES]
    loader = eval_loader(images.subset(order), eval_transform(loaded.preprocessing), BN_BATCH)
    whole = ((x, index[y]) for x, y in loader if len(y) >= BN_BATCH // 2)  # smaller batches give poor statistics
    found = batchnorm_disagreement(loaded.model, whole)
    return found, [_warning(found, weights)] if found.get("bad") else []


def _warning(found: dict[str, Any], weights: str | Path) -> str:
    return (
        f"the BatchNorm statistics are bad: {found['stored_top1']:.1f}% correct with the stored ones, "
        f"{found['batch_top1']:.1f}% with those of each batch, on {found['n']} images; "
        f"repair: convmixer recalibrate {weights} --out FOLDER"
    )


def recalibrate(
    weights: str | Path, data: str | None, out: Path, limit: int = 2048, options: Options | None = None
) -> dict[str, Any]:
    """Recompute the BatchNorm statistics on training images, without augmentation, and save the weights.

    Each mean and variance becomes the plain average of the values of all batches.

    Args:
        weights: See `models.weights.load_model`.
        data: See `find_data`.
        out: Folder for the new weights.
        limit: Training images to use, at most.
        options: What the user said about the columns, folders and groups of `data`.

    Returns:
        "weights", "images", and "top1_before", "top1_after" (percent) on up to `limit` images of one split: val, else
        train, else test. "split" names it.

    Raises:
        RequestError: An argument is wrong, or the model has no BatchNorm.
    """
    if limit < 2:
        raise RequestError(f"--limit must be at least 2, not {limit}")
    loaded = load_model(weights)
    found = find_data(data, loaded.metadata, weights, options)
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in loaded.model.modules()):
        raise RequestError(f"{weights} has no BatchNorm to recalibrate")
    splits = found.splits
    for note in splits.notes:
        print(f"data {terminal(splits.name)}: {terminal(note)}")
    held_out = "val" if splits.val is not None else "train" if splits.train is not None else found.choose(None)
    judge = sample(found.pick(held_out), limit)
    before = _top1(loaded, splits, judge)
    images = recompute_batchnorm(loaded.model, found.training_images(), loaded.preprocessing, limit)
    after = _top1(loaded, splits, judge)
    made = {"data": splits.name, "checksum": splits.checksum, "images": images}
    save_changed(out, loaded, recalibrated=made)
    print(f"{held_out} top-1 {before:.2f}% -> {after:.2f}% ({len(judge)} images); weights written to {out}")
    return {"weights": str(out), "images": images, "split": held_out, "top1_before": before, "top1_after": after}


def recompute_batchnorm(model: nn.Module, images: ImageSet, p: Preprocessing, limit: int) -> int:
    """Replace a model's BatchNorm statistics with those of a random sample of images; return how many were used."""
    batch = min(64, limit, len(images))
    count = min(limit, len(images)) // batch * batch  # equal batches: their statistics are averaged with equal weight
    order = np.random.default_rng(0).permutation(len(images))[:count]
    device = choose_device()
    loader = eval_loader(images.subset(order), eval_transform(p), batch)
    with torch.no_grad():
        torch.optim.swa_utils.update_bn(track(loader, "recalibrating", len(loader)), model.to(device), device=device)
    model.cpu()
    return count


def _top1(loaded: LoadedModel, splits: DataSplits, images: ImageSet) -> float:
    index, _ = match_classes(splits.classes, loaded.classes)
    device = choose_device()
    loader = eval_loader(images, eval_transform(loaded.preprocessing), 64)
    logits, labels = collect(loaded.model, loader, device, choose_precision("auto", device))
    return 100 * float((logits.argmax(1) == index[labels]).double().mean())
