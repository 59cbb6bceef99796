"""Training batches that are augmented on the device, from images that are kept there or cropped elsewhere.

Small images of one size are kept on the device as uint8. Larger images are decoded and cropped by the loading
processes, sent as uint8, and augmented on the device. As with every loader, the training step then applies `mix` and
`erase`.
"""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convmixer.config import Config
from convmixer.data.batch_augment import Augmentation
from convmixer.data.datasets import ImageSet
from convmixer.data.loader import Loader
from convmixer.data.policies import sent
from convmixer.data.sampler import Key, KeyedBatchSampler
from convmixer.device import available_bytes
from convmixer.preprocess import Preprocessing

MOST_BYTES = 4 * 2**30
# batches of up to this many values run in one CUDA graph: launches cost more than each operation on all images
GRAPHED = 2**22
AsGraph = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]  # see `fast.graphs.Graphs`


def why_not_kept(p: Preprocessing, images: ImageSet, device: torch.device) -> str | None:
    """Return why training images cannot be kept on a device, or None."""
    size = len(images) * p.in_chans * p.img_size**2
    if size > min(MOST_BYTES, _free(device) // 4):
        return f"the images are {size / 2**30:.1f} GiB"
    first = images.read(0)
    if first is None or first[0].size != (p.img_size, p.img_size):
        return f"the images are not of {p.img_size} x {p.img_size} pixels"
    return None


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def load(images: ImageSet, p: Preprocessing, device: torch.device) -> Tensor | None:
    """Return all images as uint8 (N, C, S, S) on a device, or None if one is unreadable or of another size."""
    values = np.empty((len(images), p.img_size, p.img_size, p.in_chans), np.uint8)
    for i in range(len(images)):
        found = images.read(i)
        if found is None or found[0].size != (p.img_size, p.img_size):
            return None
        values[i] = np.asarray(found[0]).reshape(p.img_size, p.img_size, -1)
    return torch.from_numpy(values).permute(0, 3, 1, 2).contiguous().to(device)


class DeviceLoader:
    """Endless training batches of images on a device that depend only on (seed, global step).

    The counterpart of `loader.train_loader`.

    Args:
        images: uint8 (N, C, S, S), on the device.
        labels: int64 (N,).
        config: The augmentation settings and the seed.
        p: Mean and standard deviation.
        batch_size: Images per step in this process.
        start_step: Global step of the first batch.
        steps_per_epoch: Steps in an epoch.
        rank, world: Index of this process, and the number of processes.
        weights: float32 (N,), weight of each image in the loss; None: all equal.
        odds: See `sampler.KeyedBatchSampler`.
        as_graph: Makes a CUDA graph of the work on small batches; None: none.

    Attributes:
        waited_seconds: Time spent making batches since this was last set to 0; the device computes during this time.
    """

    def __init__(
        self,
        images: Tensor,
        labels: np.ndarray,
        config: Config,
        p: Preprocessing,
        *,
        batch_size: int,
        start_step: int = 0,
        steps_per_epoch: int | None = None,
        rank: int = 0,
        world: int = 1,
        weights: np.ndarray | None = None,
        odds: np.ndarray | None = None,
        as_graph: AsGraph | None = None,
    ) -> None:
        self.weights = None if weights is None else torch.from_numpy(weights).to(images.device)
        self.images, self.labels = images, torch.from_numpy(labels).to(images.device)
        self.batch_sampler = KeyedBatchSampler(
            len(images), batch_size, config.seed, start_step, steps_per_epoch, rank, world, odds
        )
        self.augmentation, self.waited_seconds = Augmentation(config, p, images.device), 0.0
        small = batch_size * images[0].numel() <= GRAPHED
        self._graph = as_graph(self._made) if as_graph and images.is_cuda and small else None

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for keys in self.batch_sampler:
            start = time.perf_counter()
            epoch, indices = _split(keys)
            drawn = np.column_stack((indices, self.augmentation.draw(epoch, indices)))
            numbers = sent(drawn, self.images.device)
            at = numbers[:, 0].long()
            images = self._graph(numbers) if self._graph else self._made(numbers, drawn)
            batch = images, self.labels[at]
            self.waited_seconds += time.perf_counter() - start
            yield batch if self.weights is None else (*batch, self.weights[at])

    def _made(self, numbers: Tensor, drawn: np.ndarray | None = None) -> Tensor:
        images = self.images[numbers[:, 0].long()]
        return self.augmentation.apply(images, numbers[:, 1:], None if drawn is None else drawn[:, 1:])


class CroppedLoader(Loader):
    """A loader whose workers only decode and crop; the device does the rest.

    Args:
        dataset, batch_sampler, workers: See `Loader`; images are uint8 (C, S, S), see `transforms.crop_transform`.
        augmentation: What the device does.
    """

    def __init__(self, *args: Any, augmentation: Augmentation) -> None:
        super().__init__(*args)
        self.augmentation = augmentation

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        keys: Iterator[Any] = iter(copy.copy(self.batch_sampler))
        for images, *rest in super().__iter__():
            epoch, indices = _split(next(keys))  # batches come in the order of the sampler, and none is left out
            drawn, device = self.augmentation.draw(epoch, indices), self.augmentation.device
            moved = images.to(device, non_blocking=True)
            made = self.augmentation.apply(moved, sent(drawn, device), drawn)
            yield (made, *(t.to(device, non_blocking=True) for t in rest))


def _split(keys: list[Key]) -> tuple[int, np.ndarray]:
    return keys[0][0], np.array([index for _, index in keys])
