"""Trained weights, and checkpoints in the layouts of the authors and of mmpretrain."""

from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.nn.functional import cross_entropy

from convmixer.data.datasets import load_data
from convmixer.data.loader import eval_loader
from convmixer.data.transforms import eval_transform
from convmixer.evaluation.batchnorm import recompute_batchnorm
from convmixer.models.convmixer import ConvMixer
from convmixer.models.weights import save_model
from convmixer.preprocess import Preprocessing

GREY = Preprocessing(8, 1, (0.3,), (0.4,), "bilinear", 0.9)
RGB = Preprocessing(12)
State = dict[str, torch.Tensor]


class Plus(nn.Module):
    """x -> fn(x) + x, as both the authors and mmpretrain name it."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fn(x) + x
        return y


def blocks(dim: int, depth: int, k: int) -> list[nn.Module]:
    """The paper's blocks in the layout of its listing: plain modules, padding="same"."""
    return [
        nn.Sequential(
            Plus(nn.Sequential(nn.Conv2d(dim, dim, k, groups=dim, padding="same"), nn.GELU(), nn.BatchNorm2d(dim))),
            nn.Conv2d(dim, dim, 1),
            nn.GELU(),
            nn.BatchNorm2d(dim),
        )
        for _ in range(depth)
    ]


def authors(dim: int, depth: int, k: int, p: int, classes: int) -> nn.Sequential:
    """The authors' whole model: one flat nn.Sequential, so its keys are numbers."""
    stem = [nn.Conv2d(3, dim, p, stride=p), nn.GELU(), nn.BatchNorm2d(dim)]
    head = [nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(dim, classes)]
    model = nn.Sequential(*stem, *blocks(dim, depth, k), *head)
    return settle(model)


def mmpretrain(dim: int, depth: int, k: int, p: int, classes: int) -> nn.Module:
    """mmpretrain's layout: backbone.stem, backbone.stages, head.fc."""
    model = nn.Module()
    model.backbone, model.head = nn.Module(), nn.Module()
    model.backbone.stem = nn.Sequential(nn.Conv2d(3, dim, p, stride=p), nn.GELU(), nn.BatchNorm2d(dim))
    model.backbone.stages = nn.Sequential(*blocks(dim, depth, k))
    model.head.fc = nn.Linear(dim, classes)
    return settle(model)


def settle(model: nn.Module) -> Any:
    """Give BatchNorm statistics that matter, so that a mapping that drops or swaps them is noticed."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


def train_digits(folder: Path) -> None:
    """Write weights of a small ConvMixer trained for seconds on the real digits, about 95% right on the rest."""
    settings = {"val_fraction": 0.1, "seed": 0, "max_bad_fraction": 0.0}
    splits = load_data("digits", **settings)
    p = Preprocessing(splits.img_size, splits.in_chans, splits.mean, splits.std)
    images, labels = next(iter(eval_loader(splits.train, eval_transform(p), len(splits.train))))
    torch.manual_seed(0)
    model = ConvMixer(32, 2, 3, 1, in_chans=1, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 110)
    for _ in range(10):
        for part in torch.randperm(len(labels)).split(128):
            optimizer.zero_grad()
            cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
            falling.step()
    recompute_batchnorm(model, splits.train, p, 1280)  # after so few steps the running ones lag behind
    save_model(
        folder,
        model,
        architecture="convmixer_32_2_p1_k3",
        model_args={},
        classes=splits.classes,
        preprocessing=p,
        data={"spec": "digits", "checksum": splits.checksum, **settings},
    )
