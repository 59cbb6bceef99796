"""Describes what is measured: one network at one image size, batch size and precision. Nothing here measures."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from convmixer.errors import RequestError
from convmixer.models.convmixer import ConvMixer
from convmixer.models.registry import model_args

PRECISIONS = {"train": ("bf16", "fp32"), "infer": ("bf16", "fp32", "int8")}


@dataclass(frozen=True)
class Case:
    """One line of a results table.

    Args:
        task: "train" (forward, backward, AdamW step) or "infer".
        dim, depth, kernel_size, patch_size, num_classes, act: The network, see `ConvMixer`.
        img_size: Width and height of the image in pixels.
        batch_size: Images per step.
        precision: "fp32", "bf16" (autocast when training) or, only for "infer", "int8".
        threads: Threads of every contender.

    Raises:
        RequestError: A size is not positive, the image is smaller than a patch, or the task lacks the precision.
    """

    task: str
    dim: int
    depth: int
    kernel_size: int
    patch_size: int
    img_size: int
    num_classes: int
    batch_size: int
    precision: str
    threads: int
    act: str = "gelu"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS[self.task]:
            raise RequestError(f"{self.task} has no precision {self.precision!r}: {', '.join(PRECISIONS[self.task])}")
        if min(self.batch_size, self.threads) < 1:
            raise RequestError(f"batch size and threads must be positive: {self.batch_size}, {self.threads}")
        if self.img_size < self.patch_size:
            raise RequestError(f"an image of {self.img_size} pixels is smaller than the patch size {self.patch_size}")

    @property
    def model(self) -> str:
        """The network's name for `create_model`."""
        return f"convmixer_{self.dim}_{self.depth}_p{self.patch_size}_k{self.kernel_size}"

    @property
    def rows(self) -> int:
        """Rows of the matrix of a pointwise convolution: batch size times positions."""
        return self.batch_size * (self.img_size // self.patch_size) ** 2


def case_of(
    task: str,
    model: str | None,
    overrides: dict[str, Any],
    *,
    precision: str,
    batch_size: int | None = None,
    threads: int | None = None,
) -> Case:
    """Return the case of a model name; given sizes replace the model's.

    Args:
        task: "train" or "infer".
        model: A ConvMixer's name; None: `overrides` has at least dim and depth.
        overrides: Name of a size -> its value; None: the model's own.
        precision: See `Case`.
        batch_size: Images per step; None: 64 for images up to 64 pixels, else 4.
        threads: Threads of every contender; None: torch's default, which is the number of cores of this process.

    Raises:
        RequestError: The name is not a ConvMixer's, or a size is missing.
    """
    args: dict[str, Any] | None = model_args(model) if model else {"patch_size": 7, "kernel_size": 9}
    if args is None:
        raise RequestError(f"the benchmark measures ConvMixers only, and {model!r} is another model")
    args |= {name: value for name, value in overrides.items() if value is not None}
    missing = sorted({"dim", "depth"} - set(args))
    if missing:
        raise RequestError(f"give --model, or the shape itself: --{' and --'.join(missing)} missing")
    args.setdefault("num_classes", 1000)
    args.setdefault("img_size", 224 if args["num_classes"] == 1000 else 32)
    batch_size = batch_size or (64 if args["img_size"] <= 64 else 4)
    threads = torch.get_num_threads() if threads is None else threads
    return Case(task=task, batch_size=batch_size, precision=precision, threads=threads, **args)


def build(case: Case) -> ConvMixer:
    """Return the network with weights from a fixed seed. Its BatchNorm statistics are computed, so that activations
    have a normal size.
    """
    torch.manual_seed(0)
    fields = {f.name for f in dataclasses.fields(Case)}
    args = {name: getattr(case, name) for name in fields & set(ConvMixer.__init__.__annotations__)}
    model = ConvMixer(**args)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over all passes, so one pass sets the statistics
    side = min(case.img_size, 8 * case.patch_size)
    with torch.no_grad():
        model.train()(torch.randn(4, model.in_chans, side, side))
    for norm in norms:
        norm.momentum = 0.1
    return model


def batch(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return seeded images (B, 3, H, W) and labels (B,)."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch_size, 3, case.img_size, case.img_size, generator=generator)
    return images, torch.randint(case.num_classes, (case.batch_size,), generator=generator)
