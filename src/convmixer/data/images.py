"""A labelled set of images with random access, which reports and counts images that cannot be decoded."""

import copy
import sys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from convmixer.data.sources import Source
from convmixer.errors import RequestError
from convmixer.preprocess import ImageError
from convmixer.text import terminal


class ImageSet(Dataset[tuple[Image.Image, int]]):
    """Labelled images with random access.

    Args:
        source: The images.
        labels: int64 (N,), the class index of each image of the set.
        classes: Class names.
        indices: Indices of the set's images in the source, (N,); None: all images of the source.
        in_chans: 1 for mode L, 3 for mode RGB.
        max_bad: How many images may be marked as unreadable before reading raises RequestError.
        marks: uint8, 1 for each image that cannot be read. The memory is shared with worker processes and with the
            other splits of the data. None: new marks for this source only.
        first: Position in `marks` of the source's first image.
        bits: How many bits the values of 16-bit images use.
        weights: float32 (N,), weight of each image in the loss; None: all equal.
    """

    def __init__(
        self,
        source: Source,
        labels: np.ndarray,
        classes: Sequence[str],
        indices: np.ndarray | None = None,
        in_chans: int = 3,
        max_bad: int = 0,
        marks: torch.Tensor | None = None,
        first: int = 0,
        bits: int = 16,
        weights: np.ndarray | None = None,
    ) -> None:
        self.source, self.classes, self.in_chans, self.bits = source, tuple(classes), in_chans, bits
        self.labels = np.asarray(labels, np.int64)
        self.indices = np.arange(len(source)) if indices is None else np.asarray(indices)
        self.weights, self.max_bad = weights, max_bad
        self.marks, self.first = new_marks([False] * len(source)) if marks is None else marks, first

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return an image and its label. If the image cannot be decoded, return the next one that can be decoded.

        Raises:
            RequestError: More than `max_bad` images are marked, or no image of this set can be decoded.
        """
        image, position = self.next_readable(index)
        return image, int(self.labels[position])

    def next_readable(self, index: int) -> tuple[Image.Image, int]:
        """Return the first image that can be decoded from `index` on, and its position.

        Raises:
            RequestError: See `__getitem__`.
        """
        for candidate in range(index, index + len(self)):
            found = self.read(candidate % len(self))
            if found is not None:
                return found[0], candidate % len(self)
        raise RequestError("no image of the set can be decoded")

    def read(self, index: int) -> tuple[Image.Image, int] | None:
        """Return an image and its label. If the image cannot be decoded, list it in `failed` and return None."""
        try:
            image = self.source.image(int(self.indices[index]), self.in_chans, self.bits)
        except (ImageError, OSError) as error:
            self._fail(index, error)
            return None
        return image, int(self.labels[index])

    def _fail(self, index: int, error: Exception) -> None:
        place = self.first + int(self.indices[index])
        if not self.marks[place]:
            self.marks[place] = 1
            print(
                f"unreadable image left out: {terminal(named(self.name(index), error))}", file=sys.stderr, flush=True
            )
        if (count := int(self.marks.sum())) > self.max_bad:
            raise too_many(count, len(self.marks), self.failed)

    @property
    def failed(self) -> list[str]:
        """Names of the images that could not be decoded so far, in any process."""
        return [self.name(int(i)) for i in np.flatnonzero(self.marks.numpy()[self.first + self.indices])]

    def readable(self, first: int = 0, step: int = 1) -> np.ndarray:
        """Return the positions first, first + step, ... without those of images that could not be decoded so far."""
        places = np.arange(first, len(self), step)
        kept: np.ndarray = places[self.marks.numpy()[self.first + self.indices[places]] == 0]
        return kept

    def picture(self, index: int) -> Image.Image | None:
        """Return an image, or None if it cannot be decoded."""
        found = self.read(index)
        return found and found[0]

    def name(self, index: int) -> str:
        """Return the name of an image, for messages."""
        return self.source.name(int(self.indices[index]))

    def subset(self, positions: np.ndarray) -> "ImageSet":
        """Return the set of the images at these positions."""
        part = copy.copy(self)
        part.labels, part.indices = self.labels[positions], self.indices[positions]
        part.weights = None if self.weights is None else self.weights[positions]
        return part

    def with_source(self, source: Source) -> "ImageSet":
        """Return the same set with its images read from another source, in which they have the same indices."""
        other = copy.copy(self)
        other.source = source
        return other


def named(name: str, problem: object) -> str:
    """Return the text of a problem that begins with the image's name, unless the text has the name already."""
    return str(problem) if name in str(problem) else f"{name}: {problem}"


def new_marks(bad: Sequence[bool] | np.ndarray) -> torch.Tensor:
    """Return one mark per image, 1 if it is bad, in memory that worker processes share."""
    return torch.from_numpy(np.asarray(bad, np.uint8)).clone().share_memory_()


def too_many(count: int, total: int, names: Sequence[str]) -> RequestError:
    """Return the error that `count` of `total` images are bad, with the first of their names."""
    return RequestError(
        f"{count} of {total} images cannot be used, more than max_bad_fraction allows: "
        f"{'; '.join(names[:5])}{' ...' if count > len(names[:5]) else ''}; remove them, or raise max_bad_fraction"
    )
