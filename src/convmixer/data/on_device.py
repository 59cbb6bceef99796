"""Training images kept on the device as uint8 and augmented there, a whole batch at once.

Each image has its own random numbers, keyed by (seed, epoch, index), so a batch depends on nothing else. The images
follow the same distribution as those of `transforms.train_transform`; `mix` and `erase` follow in the step, as for
every loader.
"""

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from convmixer.config import Config
from convmixer.data import batch_ops, policies
from convmixer.data.datasets import ImageSet
from convmixer.data.policies import Draws
from convmixer.data.sampler import KeyedBatchSampler, is_flipped
from convmixer.device import available_bytes
from convmixer.preprocess import Preprocessing

MOST_BYTES = 4 * 2**30


def why_not(config: Config, p: Preprocessing, images: ImageSet, device: torch.device) -> str | None:
    """Return why training images cannot be held and augmented on a device, or None."""
    size = len(images) * p.in_chans * p.img_size**2
    if device.type == "mps":
        return "MPS lacks float64"
    if config.auto_augment and not policies.supported(config.auto_augment):
        return f"auto_augment {config.auto_augment} has operations that are not available there"
    crops = (config.scale, config.ratio) != ((1.0, 1.0), (1.0, 1.0))
    if crops and config.train_interpolation == "nearest":
        return "crops are resized by nearest"
    if config.scale[1] > 1:
        return "scale goes above 1"
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
    """Endless training batches that depend only on (seed, global step); the counterpart of `loader.train_loader`.

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

    Attributes:
        waited_seconds: Time spent making batches since the counter was last set to 0; the device works meanwhile.
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
    ) -> None:
        self.weights = None if weights is None else torch.from_numpy(weights).to(images.device)
        self.images, self.labels = images, torch.from_numpy(labels).to(images.device)
        self.config, self.p, self.waited_seconds = config, p, 0.0
        self.batch_sampler = KeyedBatchSampler(
            len(images), batch_size, config.seed, start_step, steps_per_epoch, rank, world, odds
        )
        std = torch.tensor(p.std, dtype=torch.float32)
        mean = torch.tensor(p.mean, dtype=torch.float32)
        self._scale, self._shift = (t.to(images.device)[:, None, None] for t in (1 / (255 * std), mean / std))
        fill = [min(255, round(255 * value)) for value in p.mean]
        black = (config.auto_augment or "").startswith("torchvision")
        self._fill = torch.tensor([0] * p.in_chans if black else fill, dtype=torch.uint8, device=images.device)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for keys in self.batch_sampler:
            start = time.perf_counter()
            epoch, indices = keys[0][0], np.array([index for _, index in keys])
            at = torch.from_numpy(indices).to(self.images.device, non_blocking=True)
            batch = self.augment(self.images[at], epoch, indices), self.labels[at]
            self.waited_seconds += time.perf_counter() - start
            yield batch if self.weights is None else (*batch, self.weights[at])

    def augment(self, images: Tensor, epoch: int, indices: np.ndarray) -> Tensor:
        """Return one random version of each image, normalised float32; images are uint8 (B, C, S, S)."""
        c, side, draws = self.config, images.shape[3], Draws(self.config.seed, epoch, indices)
        if (c.scale, c.ratio) != ((1.0, 1.0), (1.0, 1.0)):
            boxes = torch.from_numpy(policies.crop_boxes(c.scale, c.ratio, side, draws)).to(images.device)
            images = batch_ops.resized_crop(images, boxes, self._sampling(draws))
        if c.pad_crop:
            images = batch_ops.shifted(images, *(self._offset(draws) for _ in range(2)))
        images = self._flip(images, self._mirrored(epoch, indices, draws), 3)
        if c.vflip:
            images = self._flip(images, draws.uniform() < c.vflip, 2)
        layers = policies.layers_of(c.auto_augment, c.train_interpolation, side, draws) if c.auto_augment else []
        for layer in layers + (policies.jitter_layers(c.color_jitter, draws) if c.color_jitter else []):
            images = layer.apply(images, self._fill)
        return images * self._scale - self._shift

    def _sampling(self, draws: Draws) -> Tensor:
        smooth = np.where(draws.uniform() < 0.5, batch_ops.BILINEAR, batch_ops.BICUBIC)
        fixed = {"bilinear": batch_ops.BILINEAR, "bicubic": batch_ops.BICUBIC}
        how = self.config.train_interpolation
        return torch.from_numpy(np.full_like(smooth, fixed[how]) if how in fixed else smooth).to(self.images.device)

    def _offset(self, draws: Draws) -> Tensor:
        most = self.config.pad_crop
        return torch.from_numpy(np.floor(draws.uniform() * (2 * most + 1)).astype(np.int64) - most).to(
            self.images.device
        )

    def _mirrored(self, epoch: int, indices: np.ndarray, draws: Draws) -> np.ndarray:
        if self.config.hflip_mode == "alternate":
            return np.array([is_flipped(self.config.seed, epoch, int(index)) for index in indices])
        return draws.uniform() < self.config.hflip

    def _flip(self, images: Tensor, chosen: np.ndarray, axis: int) -> Tensor:
        here = torch.from_numpy(chosen).to(images.device)[:, None, None, None]
        return torch.where(here, images.flip(axis), images)
