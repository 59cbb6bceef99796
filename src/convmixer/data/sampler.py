"""Chooses the images and random numbers of each step, with pure functions of seed, epoch and position.

Therefore a resumed run continues exactly, for any number of workers and processes, and needs no saved generator
state.
"""

import hashlib
import itertools
import random
import struct
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

_FLIPS = -(2**40)  # in place of an epoch; images use epochs from 0, training steps small negative numbers

Key = tuple[int, int]  # (epoch, index of the image)


class KeyedBatchSampler(Sampler[list[Key]]):
    """Endless batches of (epoch, index); each depends only on its global step.

    An epoch is `steps_per_epoch` steps over a new permutation of the images. Images that do not fill a last step are
    left out of that epoch. At each step, the processes take consecutive parts of one global batch.

    Args:
        size: Images in the set.
        batch_size: Images per step and process.
        seed: Seed of the permutations.
        start_step: Global step to begin at; a later change applies to the next iteration.
        steps_per_epoch: Steps in an epoch.
        rank, world: Index of this process, and the number of processes.
        odds: (N,), how often each image is drawn relative to the others; images may repeat. None: every image once
            per epoch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        steps_per_epoch: int | None = None,
        rank: int = 0,
        world: int = 1,
        odds: np.ndarray | None = None,
    ) -> None:
        self.odds = odds
        self.size, self.batch_size, self.seed, self.start_step = size, batch_size, seed, start_step
        self.steps_per_epoch = steps_per_epoch or size // (batch_size * world)
        self.rank, self.world = rank, world
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __iter__(self) -> Iterator[list[Key]]:
        for step in itertools.count(self.start_step):
            yield self.batch(step)

    def batch(self, step: int) -> list[Key]:
        """Return this process's batch at a global step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, draw(self.size, self.seed, epoch, self.odds))
        first = (position * self.world + self.rank) * self.batch_size
        return [(epoch, int(index)) for index in self._order[1][first : first + self.batch_size]]


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the images in an epoch, int64 (size,)."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def draw(size: int, seed: int, epoch: int, odds: np.ndarray | None) -> np.ndarray:
    """Return the images of an epoch in order, int64 (size,): each once, or with `odds` drawn with repetition."""
    if odds is None:
        return permutation(size, seed, epoch)
    return np.random.default_rng([seed, epoch]).choice(size, size, p=odds)


def class_odds(labels: np.ndarray) -> np.ndarray:
    """Return the odds, float64 (N,), with which all classes are drawn equally often; labels are (N,)."""
    counts = np.bincount(labels)
    odds: np.ndarray = 1 / (counts[labels] * np.count_nonzero(counts))
    return odds / odds.sum()


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Return a well-mixed 64-bit seed for one image in one epoch."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, epoch, index), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def is_flipped(seed: int, epoch: int, index: int) -> bool:
    """Return whether alternating flips mirror an image in an epoch: at random in the first, then in every second
    epoch.

    Source: arXiv 2404.00498, Sec. 3.6.
    """
    return bool((sample_seed(seed, _FLIPS, index) + epoch) % 2)


def seed_everything(value: int) -> None:
    """Seed Python's, numpy's and torch's global generators (CPU only: torch.manual_seed would cost 144 µs).

    Args:
        value: 0 to 2**64 - 1.
    """
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.default_generator.manual_seed(value)
