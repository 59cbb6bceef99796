"""Random augmentation of whole batches on a device, with separate random numbers for each image.

The numbers are drawn on the CPU, keyed by (seed, epoch, index), so a batch depends on nothing else. The device gets
them in one copy. Images follow the same distribution as those of `transforms.train_transform`.
"""

import numpy as np
import torch
from torch import Tensor

from convmixer.config import Config
from convmixer.data import batch_ops, policies
from convmixer.data.policies import Draws
from convmixer.data.sampler import is_flipped
from convmixer.preprocess import Preprocessing

WHOLE = ((1.0, 1.0), (1.0, 1.0))


def why_not(config: Config, device: torch.device, cropped: bool) -> str | None:
    """Return why a device cannot augment images as the settings say, or None.

    Args:
        config: The augmentation settings.
        device: The device.
        cropped: Whether the images are cropped before, on the CPU.
    """
    if device.type == "mps":
        return "MPS lacks float64"
    if config.auto_augment and not policies.supported(config.auto_augment):
        return f"auto_augment {config.auto_augment} has operations that are not available there"
    if not cropped and (config.scale, config.ratio) != WHOLE and config.train_interpolation == "nearest":
        return "crops are resized with nearest-neighbour interpolation"
    return "scale is above 1" if not cropped and config.scale[1] > 1 else None


class Augmentation:
    """Draws the random numbers of a batch on the CPU, and augments the batch with them on the device.

    Args:
        config: The augmentation settings and the seed.
        p: Size, mean and standard deviation.
        device: The device that augments the images.
        cropped: Whether the images are cropped before, on the CPU.
    """

    def __init__(self, config: Config, p: Preprocessing, device: torch.device, cropped: bool = False) -> None:
        self.config, self.side, self.device = config, p.img_size, device
        self.crops = not cropped and (config.scale, config.ratio) != WHOLE
        self.kinds = policies.kinds_of(config.auto_augment, config.train_interpolation) if config.auto_augment else []
        self.kinds += policies.JITTER if config.color_jitter else []
        std = torch.tensor(p.std, dtype=torch.float32)
        mean = torch.tensor(p.mean, dtype=torch.float32)
        self._scale, self._shift = (t.to(device)[:, None, None] for t in (1 / (255 * std), mean / std))
        fill = [min(255, round(255 * value)) for value in p.mean]
        black = (config.auto_augment or "").startswith("torchvision")
        self._fill = torch.tensor([0] * p.in_chans if black else fill, dtype=torch.uint8, device=device)

    def draw(self, epoch: int, indices: np.ndarray) -> np.ndarray:
        """Return the random numbers for images of an epoch, float64 (B, K), for `apply`."""
        c, draws = self.config, Draws(self.config.seed, epoch, indices)
        columns: list[np.ndarray] = []
        if self.crops:
            columns += [policies.crop_boxes(c.scale, c.ratio, self.side, draws), self._sampling(draws)[:, None]]
        if c.pad_crop:
            columns += [np.floor(draws.uniform() * (2 * c.pad_crop + 1))[:, None] - c.pad_crop for _ in range(2)]
        columns += [self._mirrored(epoch, indices, draws)[:, None], (draws.uniform() < c.vflip)[:, None]]
        layers = policies.layers_of(c.auto_augment, c.train_interpolation, self.side, draws) if c.auto_augment else []
        layers += policies.jitter_layers(c.color_jitter, draws) if c.color_jitter else []
        return np.concatenate([*columns, *(layer.numbers(self.side) for layer in layers)], axis=1, dtype=np.float64)

    def apply(self, images: Tensor, numbers: Tensor, drawn: np.ndarray | None = None) -> Tensor:
        """Return one random version of each image, normalised float32.

        Args:
            images: uint8 (B, C, S, S).
            numbers: The result of `draw`, on the images' device.
            drawn: The same numbers on the CPU, or None; see `policies.Kind.apply`.
        """
        at = 0
        if self.crops:
            images, at = batch_ops.resized_crop(images, numbers[:, :4], numbers[:, 4]), 5
        if self.config.pad_crop:
            images, at = batch_ops.shifted(images, *numbers[:, at : at + 2].long().unbind(1)), at + 2
        for axis in (3, 2):
            images = torch.where((numbers[:, at] > 0)[:, None, None, None], images.flip(axis), images)
            at += 1
        for kind in self.kinds:
            columns = slice(at, at + policies.LAYER_COLUMNS)
            images = kind.apply(images, numbers[:, columns], self._fill, None if drawn is None else drawn[:, columns])
            at = columns.stop
        return images * self._scale - self._shift

    def _sampling(self, draws: Draws) -> np.ndarray:
        smooth = np.where(draws.uniform() < 0.5, batch_ops.BILINEAR, batch_ops.BICUBIC)
        fixed = {"bilinear": batch_ops.BILINEAR, "bicubic": batch_ops.BICUBIC}
        how = self.config.train_interpolation
        return np.full_like(smooth, fixed[how]) if how in fixed else smooth

    def _mirrored(self, epoch: int, indices: np.ndarray, draws: Draws) -> np.ndarray:
        if self.config.hflip_mode == "alternate":
            return np.array([is_flipped(self.config.seed, epoch, int(index)) for index in indices])
        return draws.uniform() < self.config.hflip
