"""Chooses training images and their weights: a fraction of them, and balance between classes of unequal size."""

import numpy as np

from convmixer.config import Config
from convmixer.data.images import ImageSet
from convmixer.data.splits import stratified

ALL_OF = "{} of {} training images are used, the same share of every class, chosen by seed {}"


def training_images(images: ImageSet, config: Config, notes: list[str]) -> ImageSet:
    """Return the training images that `fraction` chooses, with the weights that `balance` asks for.

    Args:
        images: All training images.
        config: Its settings `fraction`, `balance` and `seed` are used.
        notes: Notes for the user; what is done here is added to them.
    """
    if config.fraction < 1:
        kept = np.flatnonzero(~stratified(images.labels, 1 - config.fraction, config.seed))
        notes.append(ALL_OF.format(len(kept), len(images), config.seed))
        images = images.subset(kept)
    counts = np.bincount(images.labels, minlength=len(images.classes))
    present = counts[counts > 0]
    if config.balance == "loss":
        images = images.subset(np.arange(len(images)))
        weights = (len(images) / (len(present) * counts[images.labels])).astype(np.float32)
        images.weights = weights if images.weights is None else _mean_one(weights * images.weights)
        low, high = len(images) / len(present) / present.max(), len(images) / len(present) / present.min()
        notes.append(
            f"in the loss, an image of the largest class has weight {low:.3g}, one of the smallest {high:.3g}"
        )
    elif config.balance == "sample":
        notes.append(
            f"every class is drawn equally often; the smallest has {present.min()} images, which repeat in an epoch"
        )
    return images


def _mean_one(weights: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = (weights / weights.mean(dtype=np.float64)).astype(np.float32)
    return scaled
