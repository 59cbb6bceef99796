"""Loss, accuracy and confusion matrix of a model on a split, summed over all processes.

Here batches are summed one by one, for splits of any size; `evaluation.metrics` takes all logits at once.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from convmixer.data.images import ImageSet
from convmixer.results.mistakes import Answers
from convmixer.train.distributed import rank, sum_over_processes, world_size


@dataclass(frozen=True)
class Scores:
    """The results of a model on a split.

    Args:
        n: Images.
        loss: Mean cross entropy.
        top1, top5: Percent of images whose class is the likeliest, or among the five likeliest.
        confusion: int64 (classes, classes); rows are true classes, columns predicted ones.
        answers: The model's answer to each image, if asked for.
    """

    n: int
    loss: float
    top1: float
    top5: float
    confusion: np.ndarray
    answers: Answers | None = None


@torch.no_grad()
def score(
    model: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    num_classes: int,
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    images: ImageSet | None = None,
) -> Scores:
    """Return the scores of a model in eval mode; afterwards each module has its old mode again.

    Args:
        model: The model, on `device`.
        loader: This process's share of the images (B, C, H, W) and labels (B,).
        num_classes: Classes of the data.
        device: Where to compute.
        autocast: Returns the context that computes in the wanted precision.
        images: The whole split, if the answer to each image is to be kept; None: keep only sums.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device="cpu")  # loss, images with the class among the first five
    rows = []
    for inputs, labels in loader:
        with autocast():
            logits = model(inputs.to(device, non_blocking=True))
        labels, logits = labels.to(device), logits.float()
        confusion += torch.bincount(labels * num_classes + logits.argmax(1), minlength=num_classes**2)
        first_five = logits.topk(min(5, num_classes), dim=1).indices
        found = (first_five == labels[:, None]).any(1).sum()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack((loss.double(), found.double())).cpu()
        if images is not None:
            rows.append(Answers.of(logits.cpu().numpy(), labels.cpu().numpy()).table())
    for module, training in modes:  # frozen layers stay in eval mode while the others train
        module.training = training
    confusion = sum_over_processes(confusion)
    sums = sum_over_processes(sums.to(device) if device.type == "cuda" else sums)
    matrix = confusion.view(num_classes, num_classes).cpu().numpy()
    n = int(matrix.sum())
    loss_mean, top5 = (float(value) / n for value in sums)
    answers = None if images is None else _gather(rows, images, device)
    return Scores(n, loss_mean, 100 * float(matrix.trace()) / n, 100 * top5, matrix, answers)


def _gather(rows: list[np.ndarray], images: ImageSet, device: torch.device) -> Answers:
    """Return the answers of all processes, each of which read every world-th image that can be decoded."""
    places = images.readable(rank(), world_size())
    own = np.concatenate(rows) if rows else np.empty((0, 4))
    table = torch.zeros(len(images), 5, dtype=torch.float64)
    if len(places) == len(own):  # else it is unknown which image a row belongs to
        table[places] = torch.from_numpy(np.column_stack((own, np.ones(len(own)))))
    whole = sum_over_processes(table.to(device) if device.type == "cuda" else table).cpu().numpy()
    known = np.flatnonzero(whole[:, 4])
    return Answers.from_table(whole[known, :4], known)
