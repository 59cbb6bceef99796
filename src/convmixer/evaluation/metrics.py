"""Accuracy, loss, calibration and per-class results, from logits and labels."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torchmetrics.functional import classification as tm

from convmixer.errors import RequestError
from convmixer.inference import Logits, finite, torch_logits
from convmixer.results.statistics import wilson

ECE_BINS = 15

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def evaluate(
    model: nn.Module | Logits, batches: Batches, device: torch.device | None = None, precision: str = "fp32"
) -> dict[str, float]:
    """Return the metrics of a model on labelled batches; the model keeps its mode and statistics.

    Args:
        model: A module that maps (B, C, H, W) to (B, classes), or a function that does the same with arrays.
        batches: Images float32 (B, C, H, W) and labels int64 (B,).
        device: Device that the module computes on; None: the one that it is on.
        precision: Precision of the module, see `inference.torch_logits`.

    Returns:
        The result of `metrics`.
    """
    return metrics(*collect(model, batches, device, precision))


def collect(
    model: nn.Module | Logits, batches: Batches, device: torch.device | None = None, precision: str = "fp32"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits float32 (N, classes) and labels int64 (N,); arguments as in `evaluate`.

    Raises:
        RequestError: There are no images, or an output is NaN or infinite.
    """
    if isinstance(model, nn.Module):
        run = torch_logits(model, device or next(model.parameters()).device, precision)
    else:
        run = model
    pairs = [(torch.from_numpy(finite(run(images.numpy()))), labels) for images, labels in batches]
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
        top1, top5 (percent; top-k if there are k < 5 classes), loss (mean cross-entropy), n (images),
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
    scores = [  # torchmetrics needs at least two classes
        100 * score(predicted, labels, num_classes=max(2, count), average=None)[:count].double()
        for score in (tm.multiclass_precision, tm.multiclass_recall, tm.multiclass_f1_score)
    ]
    support = torch.bincount(labels, minlength=count)
    rows = zip(classes, *(score.tolist() for score in scores), support.tolist(), strict=True)
    return [ClassResult(*row) for row in rows if row[-1]]
