"""Turns settings into a job: device, precision, data, model, batch and length of the run."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from convmixer.config import Config
from convmixer.data import batch_augment, on_device
from convmixer.data.batch_augment import Augmentation
from convmixer.data.datasets import DataSplits, load_data
from convmixer.data.images import ImageSet
from convmixer.data.keep import keep_decoded
from convmixer.data.loader import Loader, eval_loader, train_loader
from convmixer.data.on_device import CroppedLoader, DeviceLoader
from convmixer.data.options import Options
from convmixer.data.sampler import class_odds
from convmixer.data.transforms import (
    crop_transform,
    eval_transform,
    prepared_transform,
    preprocessing_of,
    train_transform,
)
from convmixer.device import choose_device, choose_precision
from convmixer.errors import RequestError, shown
from convmixer.fast import FastConvMixer, accelerate, has_kernels, uses_kernels
from convmixer.fast.graphs import Graphs
from convmixer.models.convmixer import ConvMixer
from convmixer.models.create import create_model
from convmixer.models.registry import model_args
from convmixer.models.weights import LoadedModel, adapt_channels, load_model
from convmixer.preprocess import Preprocessing
from convmixer.train.chosen import training_images
from convmixer.train.distributed import rank, synchronise_batch_norm, world_size
from convmixer.train.freeze import ALL, freeze
from convmixer.train.initialize import initialize
from convmixer.train.module import TrainingModule
from convmixer.train.optim import check_optimizer, parameter_groups

Build = tuple[str, dict[str, Any]]  # what `create_model` is given: a name and its arguments


@dataclass(frozen=True)
class Job:
    """A run with every "auto" resolved.

    Args:
        spec: The data argument, made unambiguous, see `argument.Argument`.
        config: The settings.
        data: The splits.
        preprocessing: How images are prepared; training adds the random augmentations.
        build: Name and arguments of the model.
        model: On its device, with kernels if they are built.
        device: Where the model is.
        kernels: What the model runs on, in words: "CPU kernels", "CUDA kernels" or "plain PyTorch".
        batch_size: Images per step over all processes.
        steps_per_epoch: Optimizer steps per epoch.
        images: The training images, if they are kept on the device.
        augmentation: Where images are augmented and why, in words; empty on a CPU.
        kept: The images of "train" and "val" that are kept decoded, see `data.keep`; empty if none are kept.
    """

    spec: str
    config: Config
    data: DataSplits
    preprocessing: Preprocessing
    build: Build
    model: nn.Module
    device: torch.device
    kernels: str
    batch_size: int
    steps_per_epoch: int
    images: torch.Tensor | None = None
    augmentation: str = ""
    kept: dict[str, ImageSet] = field(default_factory=dict)

    def module(
        self,
        epochs: float,
        first_step: int = 0,
        lr: float | None = None,
        model: nn.Module | None = None,
        config: Config | None = None,
        progress: Callable[[int], float] | None = None,
    ) -> TrainingModule:
        """Return the module that trains the model for `epochs` epochs.

        Args:
            epochs: Length of the schedule.
            first_step: Number of steps of the run before the module's first step.
            lr: Peak learning rate; None: the one of the settings.
            model, config: Model and settings to use instead of the job's.
            progress: See `TrainingModule`.
        """
        config = config or self.config
        return TrainingModule(
            self.model if model is None else model,
            config if lr is None else dataclasses.replace(config, lr=lr),
            num_classes=len(self.data.classes),
            steps_per_epoch=self.steps_per_epoch,
            epochs=epochs,
            first_step=first_step,
            progress=progress,
        )

    @property
    def odds(self) -> np.ndarray | None:
        """How often each training image is drawn, relative to others; None: each once per epoch."""
        assert self.data.train is not None
        return class_odds(self.data.train.labels) if self.config.balance == "sample" else None

    def train_loader(self, start_step: int = 0, workers: int | str | None = None) -> Loader | DeviceLoader:
        """Return this process's endless loader of training batches, beginning with those of step `start_step`."""
        assert self.data.train is not None
        if self.images is not None:
            return DeviceLoader(
                self.images,
                self.data.train.labels,
                self.config,
                self.preprocessing,
                batch_size=self.batch_size // world_size(),
                start_step=start_step,
                steps_per_epoch=self.steps_per_epoch,
                rank=rank(),
                world=world_size(),
                odds=self.odds,
                weights=self.data.train.weights,
                as_graph=Graphs,
            )
        config, p, cropped = self.config, self.preprocessing, self.config.augment_on == "after-crop"
        kind = partial(CroppedLoader, augmentation=Augmentation(config, p, self.device, True)) if cropped else Loader
        return train_loader(
            self.kept.get("train", self.data.train),
            (crop_transform if cropped else train_transform)(config, p),
            batch_size=self.batch_size // world_size(),
            seed=self.config.seed,
            start_step=start_step,
            steps_per_epoch=self.steps_per_epoch,
            workers=self.config.workers if workers is None else workers,
            rank=rank(),
            world=world_size(),
            alternate_flip=self.config.hflip_mode == "alternate" and not cropped,
            odds=self.odds,
            kind=kind,
        )

    def eval_loader(self, split: str) -> Loader | None:
        """Return this process's share of a split, or None if there is no such split."""
        images = getattr(self.data, split)
        if not images:
            return None
        # the workers live as long as the loader, and small splits are read faster without workers
        workers = self.config.workers if len(images) > 2000 else 0
        batch = max(1, min(256, self.batch_size // world_size()))
        p = self.preprocessing
        transform = prepared_transform(p) if split in self.kept else eval_transform(p)
        return eval_loader(self.kept.get(split, images), transform, batch, workers, rank(), world_size())


def prepare(
    spec: str,
    config: Config,
    build: Build | None = None,
    preprocessing: Preprocessing | None = None,
    recorded: bool = False,
) -> Job:
    """Return a job: data loaded, model built from the seed (or weights), everything on its device.

    Args:
        spec: The data argument.
        config: The settings.
        build: Name and arguments of the model instead of `config.model`.
        preprocessing: The preprocessing of the run, if it is resumed. Then the starting weights are not loaded,
            because the checkpoint replaces them.
        recorded: See `datasets.load_data`.

    Raises:
        RequestError: Data, model, weights or device are not available, or do not fit each other.
    """
    device, asked = choose_device(config.device), config.precision
    if device.type == "cuda":  # a resumed run ends with the same bits, also without our kernels
        torch.backends.cudnn.deterministic = True
    config = dataclasses.replace(config, device=device.type, precision=choose_precision(asked, device))
    loaded = load_model(config.weights) if config.weights and preprocessing is None else None
    side = config.img_size or (loaded.preprocessing.img_size if loaded else None)
    data = load_data(
        spec,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.seed,
        max_bad_fraction=config.max_bad_fraction,
        img_size=side,
        recorded=recorded,
        options=Options.of(config),
    )
    if data.train is None:
        raise RequestError(f"{spec} has no training images: name a folder with `train` in it")
    if len(data.classes) < 2:
        raise RequestError(f"{spec} has only one class, {shown(data.classes[0])!r}: training needs two or more")
    if config.patience and not data.val:
        raise RequestError("patience needs a validation split: set val_fraction above 0, or leave patience out")
    data = dataclasses.replace(data, train=training_images(data.train, config, data.notes))
    assert data.train is not None
    resumes = preprocessing is not None
    if config.freeze and not config.weights:
        raise RequestError("freeze leaves layers as they are in the starting weights: add --weights")
    preprocessing = preprocessing or _preprocessing(config, data, loaded)
    train_transform(config, preprocessing)  # refuses unknown augmentations before anything is written
    check_optimizer(config)
    name, args = build or _choose(config, preprocessing.img_size, loaded)
    config = dataclasses.replace(config, model=name, img_size=preprocessing.img_size)
    torch.manual_seed(config.seed)
    model = create_model(name, num_classes=len(data.classes), in_chans=data.in_chans, **args)
    if loaded:
        _start_from(model, loaded, data.classes)
    if not resumes:
        _initialize(model, config, loaded, data, preprocessing)
    model.to(device)
    _check_side(model, name, preprocessing)
    freeze(model, config.freeze)
    parameter_groups(model, config)  # refuses a layer_decay that the model cannot have
    model, kernels = _fast(model, config, device)
    if asked == "auto" and type(model) is FastConvMixer:  # halves the memory traffic, even without bf16 instructions
        config = dataclasses.replace(config, precision="bf16")
    batch = _batch_size(config, len(data.train))
    steps = max(1, len(data.train) // batch)
    config, images, augmentation = _place_images(config, data, preprocessing, device, resumes)
    kept: dict[str, ImageSet] = {}
    if images is None:
        config, kept = _keep(config, data, preprocessing)
    made = (data.spec, config, data, preprocessing, (name, args), model, device, kernels)
    return Job(*made, batch, steps, images, augmentation, kept)


def _keep(config: Config, data: DataSplits, p: Preprocessing) -> tuple[Config, dict[str, ImageSet]]:
    """Return the settings with the resolved `cache`, the same in all processes, and the images that are kept."""
    if config.cache == "auto" and world_size() > 1:  # each process would keep all images once more
        return dataclasses.replace(config, cache="off"), {}
    found = keep_decoded(config, data, p)
    data.notes.extend(found.notes)
    return dataclasses.replace(config, cache=found.where), found.sets


def _place_images(
    config: Config, data: DataSplits, p: Preprocessing, device: torch.device, resumes: bool
) -> tuple[Config, torch.Tensor | None, str]:
    """Return the settings with the resolved `augment_on`, the training images if the device keeps them, and the
    words for `Job.augmentation`.

    Raises:
        RequestError: The settings ask for the device, but images cannot be augmented there.
    """
    asked, images, reason = config.augment_on, None, None
    # without trained layers below the classifier, each image is augmented a few times at most
    if asked == "cpu" or (asked == "auto" and (device.type != "cuda" or config.freeze == ALL)):
        return dataclasses.replace(config, augment_on="cpu"), None, ""
    assert data.train is not None
    if asked != "after-crop":
        reason = batch_augment.why_not(config, device, cropped=False) or on_device.why_not_kept(p, data.train, device)
        images = None if reason else on_device.load(data.train, p, device)
        reason = reason if reason or images is not None else "an image is unreadable or of another size"
    if images is not None:
        said = f"on the device, which keeps all {len(images)} images ({images.numel() / 2**20:.0f} MiB)"
        return dataclasses.replace(config, augment_on="device"), images, said
    if resumes and asked == "device":
        raise RequestError(f"the run kept its images on the device, and now it cannot: {reason}")
    if refused := batch_augment.why_not(config, device, cropped=True):
        if asked != "auto":
            raise RequestError(f"images cannot be augmented on the device, {refused}: leave --augment-on out")
        return dataclasses.replace(config, augment_on="cpu"), None, f"{_in_processes(config)}: {refused}"
    said = f"on the device, after decoding and crop {_in_processes(config)}"
    return dataclasses.replace(config, augment_on="after-crop"), None, f"{said}: {reason}" if reason else said


def _in_processes(config: Config) -> str:
    return f"on the CPU, in loading processes (workers: {config.workers})"


def _preprocessing(config: Config, data: DataSplits, loaded: LoadedModel | None) -> Preprocessing:
    """Return the preprocessing: each value from the settings, else from the weights, else from the data."""
    known = loaded.preprocessing if loaded and loaded.preprocessing.in_chans == data.in_chans else data
    mean, std = config.mean or known.mean, config.std or known.std
    return preprocessing_of(data, dataclasses.replace(config, mean=mean, std=std))


def automatic_model(img_size: int) -> str:
    """Return the name of a model with 16 x 16 patches of an image, which costs the same at every image size."""
    return f"convmixer_256_8_p{max(1, round(img_size / 16))}_k5"


def _choose(config: Config, img_size: int, loaded: LoadedModel | None) -> Build:
    """Return the model's name and arguments, from the weights or from the settings."""
    if loaded and config.model == "auto":
        name, args = loaded.metadata["name"], dict(loaded.metadata["model_args"])
    elif config.model == "auto":
        name, args = automatic_model(img_size), {}
    else:
        name, args = config.model, {}
        if loaded and isinstance(loaded.model, ConvMixer) and model_args(name):
            args["act"] = loaded.model.act  # the variant's default may differ, and no tensor reveals it
    if config.act:
        args["act"] = config.act
    if config.drop_rate:
        args["drop_rate"] = config.drop_rate
    return name, args


@torch.no_grad()
def _check_side(model: nn.Module, name: str, p: Preprocessing) -> None:
    """Check that a model takes images of the chosen size, by running it on one.

    Raises:
        RequestError: The model does not take images of this size.
    """
    device = next(model.parameters()).device
    try:
        model.eval()(torch.zeros(1, p.in_chans, p.img_size, p.img_size, device=device))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise RequestError(
            f"{name} does not take images of {p.img_size} pixels ({error}): choose another --img-size or --model"
        ) from error
    model.train()


def _start_from(model: nn.Module, loaded: LoadedModel, classes: tuple[str, ...]) -> None:
    """Copy weights into a model.

    If the classes differ, the weights of the classifier are copied only for classes of the same name. If the number
    of image channels differs, the stem's weights are adapted.

    Raises:
        RequestError: Other tensors differ in shape.
    """
    own, state = model.state_dict(), dict(loaded.model.state_dict())
    head = _name_of(model, model.get_classifier())  # type: ignore[operator]
    if tuple(classes) != loaded.classes:
        state |= {key: own[key] for key in own if key.startswith(f"{head}.")}
    first = next((key for key, value in own.items() if value.ndim == 4), "")
    if first in state and state[first].shape[1] != own[first].shape[1]:
        state[first] = adapt_channels(state[first], own[first].shape[1])
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    if wrong or state.keys() - own.keys():
        key = wrong[0] if wrong else min(state.keys() - own.keys())
        raise RequestError(
            f"the weights in {loaded.source} belong to another model ({key} differs): add --model auto to use it"
        )
    model.load_state_dict(state)


def _initialize(
    model: nn.Module, config: Config, loaded: LoadedModel | None, data: DataSplits, p: Preprocessing
) -> None:
    """Set the initial weights that the settings ask for.

    Raises:
        RequestError: The weights to start from would be overwritten.
    """
    if loaded and config.stem_init != "default":
        raise RequestError(
            f"stem_init {config.stem_init} would overwrite the stem of {config.weights}: leave out one of the two"
        )
    if loaded and config.head_init != "default" and loaded.classes == tuple(data.classes):
        raise RequestError(f"head_init {config.head_init} would overwrite the classifier of {config.weights}")
    assert data.train is not None
    initialize(model, config, data.train, p)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def _fast(model: nn.Module, config: Config, device: torch.device) -> tuple[nn.Module, str]:
    """Return the model, with kernels swapped in if possible, and the words for `Job.kernels`."""
    if config.sync_bn and world_size() > 1:
        return synchronise_batch_norm(model, device), "plain PyTorch, synchronised BatchNorm"
    if has_kernels(device, config.precision):
        model = accelerate(model)
    return model, f"{device.type.upper()} kernels" if uses_kernels(model) else "plain PyTorch"


def _batch_size(config: Config, images: int) -> int:
    """Return images per step: the setting, or fewer if there are fewer training images.

    Raises:
        RequestError: The batch cannot be divided equally among the processes and their `grad_accum` parts.
    """
    parts = world_size() * config.grad_accum
    if config.batch_size % parts:
        raise RequestError(
            f"batch_size {config.batch_size} cannot be divided among {world_size()} processes in {config.grad_accum} "
            f"parts each: use a multiple of {parts}"
        )
    batch = math.floor(min(config.batch_size, images) / parts) * parts
    if batch == 0:
        raise RequestError(f"{images} training images are too few for {parts} parts of a batch")
    return batch
