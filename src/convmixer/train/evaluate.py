"""Model and images in, honest numbers out: accuracy with its interval, calibration, per-class results, BatchNorm.

`evaluate` is what training uses after every epoch; `val` and `recalibrate` are commands. Nothing here trains.
"""

import copy
import csv
import io
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torchmetrics.functional import classification as tm

from convmixer.data.datasets import DataSplits, ImageSet, load_data
from convmixer.data.loader import eval_loader
from convmixer.data.transforms import eval_transform
from convmixer.device import choose_device, choose_precision
from convmixer.errors import RequestError
from convmixer.files import write_atomic
from convmixer.inference import Logits, load_classifier, torch_logits
from convmixer.models.weights import LoadedModel, load_model, save_changed
from convmixer.preprocess import Preprocessing

ECE_BINS = 15
CALIBRATION = 64  # training images for int8
BN_IMAGES, BN_BATCH = 256, 64  # enough to see bad statistics, few enough to cost little

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def evaluate(
    model: nn.Module | Logits, batches: Batches, device: torch.device | None = None, precision: str = "fp32"
) -> dict[str, float]:
    """Return the metrics of a model on labelled batches; its mode and statistics stay as they were.

    Args:
        model: A module that maps (B, C, H, W) to (B, classes), or a function that does so on arrays.
        batches: Images float32 (B, C, H, W) and labels int64 (B,).
        device: Where a module computes; None: where it is.
        precision: Of a module, see `inference.torch_logits`.

    Returns:
        See `metrics`.
    """
    return metrics(*collect(model, batches, device, precision))


def collect(
    model: nn.Module | Logits, batches: Batches, device: torch.device | None = None, precision: str = "fp32"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits float32 (N, classes) and labels int64 (N,); arguments as in `evaluate`.

    Raises:
        RequestError: There is not one image.
    """
    if isinstance(model, nn.Module):
        run = torch_logits(model, device or next(model.parameters()).device, precision)
    else:
        run = model
    pairs = [(torch.from_numpy(run(images.numpy())), labels) for images, labels in batches]
    if not pairs:
        raise RequestError("there are no images to evaluate on")
    logits, labels = zip(*pairs, strict=True)
    return torch.cat(logits), torch.cat(labels)


def metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Return accuracy, loss and calibration.

    Args:
        logits: float32 (N, classes).
        labels: int64 (N,).

    Returns:
        top1, top5 (percent; top-n where there are n < 5 classes), loss (mean cross-entropy), n,
        ece (expected calibration error, 0 to 1, 15 bins of equal width), ci95 (Wilson interval of top1, percent).

    Source: Guo et al., arXiv 1706.04599, Eq. 3 (ece); Wilson 1927 (interval).
    """
    n, classes = logits.shape
    best = logits.topk(min(5, classes)).indices
    hits = best == labels[:, None]
    correct = int(hits[:, 0].sum())
    ece = tm.multiclass_calibration_error(logits.softmax(1), labels, classes, n_bins=ECE_BINS) if classes > 1 else 0.0
    return {
        "top1": 100 * correct / n,
        "top5": 100 * int(hits.any(1).sum()) / n,
        "loss": float(nn.functional.cross_entropy(logits, labels)),
        "n": n,
        "ece": float(ece),
        "ci95": [100 * bound for bound in wilson(correct, n)],
    }


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a share of `correct` in `n`, 0 to 1; 95% by default."""
    share, spread = correct / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class ClassResult:
    """One class: precision, recall and F1 in percent, and its number of images."""

    name: str
    precision: float
    recall: float
    f1: float
    n: int


def per_class(logits: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> list[ClassResult]:
    """Return precision, recall and F1 for every class that has images, in the order of `classes`."""
    predicted, count = logits.argmax(1), len(classes)
    scores = [  # torchmetrics knows no single class
        100 * score(predicted, labels, num_classes=max(2, count), average=None)[:count].double()
        for score in (tm.multiclass_precision, tm.multiclass_recall, tm.multiclass_f1_score)
    ]
    support = torch.bincount(labels, minlength=count)
    rows = zip(classes, *(score.tolist() for score in scores), support.tolist(), strict=True)
    return [ClassResult(*row) for row in rows if row[-1]]


def val(
    weights: str | Path,
    data: str | None = None,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 64,
    precision: str = "auto",
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure a model on a split, print the tables, and return the numbers.

    Args:
        weights: See `inference.load_classifier`.
        data: See `data.load_data`; None: the data that the weights were trained on, split as then.
        split: "train", "val" or "test".
        limit: Evaluate on a seeded sample of this many images; None: on all.
        batch_size: Images at once, at least 1.
        precision: See `inference.load_classifier`.
        out: A folder for metrics.json, per_class.csv and confusion_matrix.png, or None.

    Returns:
        See `metrics`, and "data", "split", "checksum", "per_class", "warnings", "batchnorm". One of the warnings is
        that the data have changed since the weights were trained on them.

    Raises:
        RequestError: Bad arguments, no such split, or classes that the model does not know.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise RequestError(f"--batch-size and --limit must be at least 1, not {batch_size} and {limit}")
    if precision == "int8":
        classifier = load_classifier(weights, precision, calibration=lambda p: _calibration(weights, data, p))
    else:
        classifier = load_classifier(weights, precision)
    splits = find_data(data, classifier.describe, weights)
    images = sample(pick(splits, split), limit)
    index = class_index(splits.classes, classifier.classes)
    loader = eval_loader(images, eval_transform(classifier.preprocessing), batch_size, workers=0)
    logits, labels = collect(classifier.logits, _progress(loader, "evaluating"))
    labels = index[labels]
    warnings = [*_changed(data, splits, split, classifier.describe), *unreadable(images)]
    warnings += _numbers_for_names(splits.classes, classifier.classes)
    batchnorm = _check_batchnorm(weights, images, index, classifier.preprocessing) if _is_torch(classifier) else {}
    if batchnorm.get("bad"):
        warnings.append(_batchnorm_warning(batchnorm, weights))
    classes = per_class(logits, labels, classifier.classes)
    result = metrics(logits, labels) | {
        "data": splits.name,
        "split": split,
        "checksum": splits.checksum,
        "precision": classifier.describe.get("precision", "exported"),
        "per_class": [vars(row) for row in classes],
        "batchnorm": batchnorm,
        "warnings": warnings,
    }
    _print(result, classes)
    if out is not None:
        n = len(classifier.classes)
        counts = tm.multiclass_confusion_matrix(logits.argmax(1), labels, max(2, n)).numpy()[:n, :n]
        _write(out, result, classes, counts, classifier.classes)
    return result


def _calibration(weights: str | Path, data: str | None, p: Preprocessing) -> torch.Tensor:
    """Return a batch of training images for int8."""
    train = pick(find_data(data, load_model(weights).metadata, weights), "train")
    images, _ = next(iter(eval_loader(sample(train, CALIBRATION), eval_transform(p), CALIBRATION)))
    return images


def find_data(data: str | None, metadata: dict[str, Any], weights: str | Path) -> DataSplits:
    """Return a data set by name, or the one that the weights were trained on; split as it was for training.

    Args:
        data: What the user gave, or None.
        metadata: Of the weights; see `models.weights.save_model` for its entry "data".
        weights: Named in the error.

    Raises:
        RequestError: No data are given and the weights name none, or they cannot be loaded.
    """
    trained_on = metadata.get("data") or {}
    spec = data or trained_on.get("spec")
    if spec is None:
        raise RequestError(f"{weights} does not say what it was trained on: name the data, e.g. cifar10 or a folder")
    settings = {"val_fraction": 0.1, "seed": 0, "max_bad_fraction": 0.01}
    split = {key: trained_on.get(key, value) for key, value in settings.items()}
    return load_data(str(spec), recorded=data is None, **split)


def _changed(data: str | None, splits: DataSplits, split: str, metadata: dict[str, Any]) -> list[str]:
    """Return a line where the data of the weights have changed: their splits are then made anew."""
    trained_on = metadata.get("data") or {}
    spec, checksum = trained_on.get("spec"), trained_on.get("checksum")
    own = data is None or (spec is not None and Path(data).absolute() == Path(spec).absolute())
    if split == "train" or not own or checksum in (None, splits.checksum):
        return []
    return [
        f"the data at {spec} have changed since the training: images of this {split} split may have been trained on, "
        "and the accuracy may be too high; measure on images that the training never saw"
    ]


def pick(splits: DataSplits, split: str) -> ImageSet:
    """Return a split of the data.

    Raises:
        RequestError: The data have no such split.
    """
    images: ImageSet | None = getattr(splits, split)
    if images is None:
        there = [name for name in ("train", "val", "test") if getattr(splits, name) is not None]
        raise RequestError(f"{splits.name} has no {split} split: choose --split from {', '.join(there)}")
    return images


def sample(images: ImageSet, limit: int | None, seed: int = 0) -> ImageSet:
    """Return a random subset of `limit` images in their order, or all of them."""
    if limit is None or limit >= len(images):
        return images
    return images.subset(np.sort(np.random.default_rng(seed).permutation(len(images))[:limit]))


def class_index(data: Sequence[str], model: Sequence[str]) -> torch.Tensor:
    """Return the model's output for each class of the data, matched by name: int64 (classes of the data,).

    A model without names (they are "0", "1", ...) is taken to have the order of the data.

    Raises:
        RequestError: The model lacks a class of the data.
    """
    if _nameless(model) and len(data) == len(model):
        return torch.arange(len(data))
    missing = [name for name in data if name not in model]
    if missing:
        raise RequestError(
            f"the model does not know {len(missing)} of the {len(data)} classes of the data: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; it knows {', '.join(model[:5])}, ..."
        )
    return torch.tensor([model.index(name) for name in data])


def _nameless(classes: Sequence[str]) -> bool:
    return list(classes) == [str(i) for i in range(len(classes))]


def _numbers_for_names(data: Sequence[str], model: Sequence[str]) -> list[str]:
    if _nameless(model) and list(data) != list(model):
        return ["the weights carry no class names: taken to be in the order of the data"]
    return []


def unreadable(images: ImageSet) -> list[str]:
    """Return a line that counts the images which could not be decoded, or nothing."""
    failed = images.failed
    return [f"{len(failed)} images could not be decoded and are left out: {', '.join(failed[:3])}"] if failed else []


def _is_torch(classifier: Any) -> bool:
    return "device" in classifier.describe


def batchnorm_disagreement(model: nn.Module, batches: Batches) -> dict[str, Any]:
    """Return how a model does with its stored BatchNorm statistics and with those of each batch.

    Where the stored ones are good the two differ little. They are called bad where the batch's own statistics
    classify more images rightly, by 2 points and by 3 standard deviations of the paired difference.

    Args:
        model: A module with BatchNorm2d; nothing of it is changed.
        batches: Images in random order, so that each batch holds many classes, and labels.

    Returns:
        "stored_top1", "batch_top1" (percent), "n", "bad"; empty where there is no BatchNorm or no image.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return {}
    model = copy.deepcopy(model).eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 0.0  # running statistics stay as they are
    hits: list[list[torch.Tensor]] = [[], []]
    with torch.inference_mode():
        for images, labels in batches:
            for mode, found in enumerate(hits):
                for norm in norms:
                    norm.train(bool(mode))
                found.append(model(images).argmax(1) == labels)
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


def _check_batchnorm(weights: str | Path, images: ImageSet, index: torch.Tensor, p: Preprocessing) -> dict[str, Any]:
    order = np.random.default_rng(0).permutation(len(images))[:BN_IMAGES]
    loader = eval_loader(images.subset(order), eval_transform(p), BN_BATCH)
    whole = ((x, index[y]) for x, y in loader if len(y) >= BN_BATCH // 2)  # fewer make poor statistics
    return batchnorm_disagreement(load_model(weights).model, whole)


def _batchnorm_warning(found: dict[str, Any], weights: str | Path) -> str:
    return (
        f"the BatchNorm statistics are bad: {found['stored_top1']:.1f}% right with the stored ones, "
        f"{found['batch_top1']:.1f}% with each batch's own, on {found['n']} images; "
        f"repair: convmixer recalibrate {weights} --out FOLDER"
    )


def recalibrate(weights: str | Path, data: str | None, out: Path, limit: int = 2048) -> dict[str, Any]:
    """Recompute the BatchNorm statistics on training images, as evaluation sees them, and save the weights.

    Every statistic becomes the plain mean over all batches.

    Args:
        weights: See `models.weights.load_model`.
        data: See `find_data`.
        out: Folder for the new weights.
        limit: Training images to use, at most.

    Returns:
        "weights", "images", and "top1_before", "top1_after" (percent) on up to `limit` images of the val split, or
        of train where there is none; "split" says which.

    Raises:
        RequestError: Bad arguments, or a model without BatchNorm.
    """
    if limit < 2:
        raise RequestError(f"--limit must be at least 2, not {limit}")
    loaded = load_model(weights)
    splits = find_data(data, loaded.metadata, weights)
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in loaded.model.modules()):
        raise RequestError(f"{weights} has no BatchNorm to recalibrate")
    held_out = "train" if splits.val is None else "val"
    judge = sample(pick(splits, held_out), limit)
    before = _top1(loaded, splits, judge)
    images = recompute_batchnorm(loaded.model, pick(splits, "train"), loaded.preprocessing, limit)
    after = _top1(loaded, splits, judge)
    made = {"data": splits.name, "checksum": splits.checksum, "images": images}
    save_changed(out, loaded, recalibrated=made)
    print(f"{held_out} top-1 {before:.2f}% -> {after:.2f}% ({len(judge)} images); weights written to {out}")
    return {"weights": str(out), "images": images, "split": held_out, "top1_before": before, "top1_after": after}


def recompute_batchnorm(model: nn.Module, images: ImageSet, p: Preprocessing, limit: int) -> int:
    """Replace a model's BatchNorm statistics by those of a random sample of images; return how many were used."""
    batch = min(64, limit, len(images))
    count = min(limit, len(images)) // batch * batch  # equal batches: their statistics are averaged with equal weight
    order = np.random.default_rng(0).permutation(len(images))[:count]
    device = choose_device()
    loader = eval_loader(images.subset(order), eval_transform(p), batch)
    with torch.no_grad():
        torch.optim.swa_utils.update_bn(_progress(loader, "recalibrating"), model.to(device), device=device)
    model.cpu()
    return count


def _top1(loaded: LoadedModel, splits: DataSplits, images: ImageSet) -> float:
    index = class_index(splits.classes, loaded.classes)
    device = choose_device()
    loader = eval_loader(images, eval_transform(loaded.preprocessing), 64)
    logits, labels = collect(loaded.model, loader, device, choose_precision("auto", device))
    return 100 * float((logits.argmax(1) == index[labels]).double().mean())


def _progress(loader: Any, text: str) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    quick = len(loader) < 8 or not console.is_terminal
    return loader if quick else track(loader, text, len(loader), console=console, transient=True)


def _print(result: dict[str, Any], classes: Sequence[ClassResult]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200)
    low, high = result["ci95"]
    console.print(f"{result['data']}, {result['split']} split: {result['n']} images ({result['precision']})")
    console.print(f"top-1 {result['top1']:.2f}% (95% Wilson interval {low:.2f} to {high:.2f})", highlight=False)
    console.print(f"top-5 {result['top5']:.2f}%, loss {result['loss']:.4f}, ECE {result['ece']:.4f}", highlight=False)
    worst = sorted(classes, key=lambda row: row.f1)[:10]
    shown = classes if len(classes) <= 25 else worst
    table = Table("class", "precision", "recall", "F1", "images", box=None, pad_edge=False)
    if shown is worst:
        table.title = f"the 10 classes of {len(classes)} with the lowest F1"
    for row in shown:
        table.add_row(escape(row.name), *(f"{v:.1f}" for v in (row.precision, row.recall, row.f1)), str(row.n))
    console.print(table)
    for warning in result["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False)


def _write(
    out: Path, result: dict[str, Any], classes: Sequence[ClassResult], counts: np.ndarray, names: Sequence[str]
) -> None:
    from convmixer.results.plots import confusion_matrix

    write_atomic(out / "metrics.json", json.dumps(result | {"confusion_matrix": counts.tolist()}, indent=1).encode())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "precision", "recall", "f1", "images"])
    writer.writerows(vars(row).values() for row in classes)
    write_atomic(out / "per_class.csv", text.getvalue().encode(errors="surrogateescape"))
    confusion_matrix(counts, names, out / "confusion_matrix.png")
    print(f"tables and picture written to {out}")
