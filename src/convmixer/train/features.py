"""Computes the frozen layers' features of the images once and keeps them, so that a classifier trains in seconds.

The name of a file of features is a digest of everything that they depend on: images, frozen weights, preprocessing
and augmentation.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn as nn

from convmixer._version import __version__
from convmixer.config import Config
from convmixer.data.images import ImageSet
from convmixer.data.loader import Loader, view_loader
from convmixer.data.sampler import KeyedBatchSampler
from convmixer.data.transforms import eval_transform, train_transform
from convmixer.device import available_bytes
from convmixer.errors import RequestError
from convmixer.fast import has_kernels, optimize_for_inference
from convmixer.fast.inference import PlainInference
from convmixer.files import cache_folder, prune, write_atomic
from convmixer.models.digest import digest_weights
from convmixer.progress import track
from convmixer.train.distributed import world_size
from convmixer.train.engine import measure_speed
from convmixer.train.freeze import ALL, classifier_of
from convmixer.train.module import TrainingModule
from convmixer.train.optim import is_muon
from convmixer.train.setup import Job

BATCH = 64
CACHE_BYTES = 4 << 30  # all features together; beyond this the least recently used are deleted
PREFIX = "1."  # in `head_module`, the names of the classifier's parameters begin with this

Part = tuple[torch.Tensor, ...]  # features (N, ...), labels (N,) and, if the images have weights, weights (N,)


@dataclass(frozen=True)
class Features:
    """The frozen layers' features of the images.

    Args:
        train: Features of the training images, one part per view.
        val: Features of the validation images; None if there is no validation split.
        said: How many images there are and whether the features came from the cache, as a text for the user.
    """

    train: list[Part]
    val: Part | None
    said: str

    def train_loader(self, job: Job, start_step: int) -> "FeatureLoader":
        """Return an endless loader that starts at a step and draws the same images as `Job.train_loader`."""
        sampler = KeyedBatchSampler(
            len(self.train[0][1]), job.batch_size, job.config.seed, start_step, job.steps_per_epoch, odds=job.odds
        )
        return FeatureLoader(self.train, sampler)

    def val_batches(self) -> list[Part] | None:
        """Return the validation images' features in batches."""
        return None if self.val is None else list(zip(*(part.split(1024) for part in self.val), strict=True))


class FeatureLoader:
    """Batches of features; epoch e gets view e modulo the number of views.

    Attributes:
        waited_seconds: As in `Loader`; always 0, because the features are in memory.
    """

    waited_seconds = 0.0

    def __init__(self, views: list[Part], sampler: KeyedBatchSampler) -> None:
        self.views, self.sampler = views, sampler

    def __iter__(self) -> Iterator[Part]:
        for keys in self.sampler:
            chosen = torch.tensor([index for _, index in keys])
            yield tuple(values[chosen] for values in self.views[keys[0][0] % len(self.views)])


def head_module(job: Job, epochs: float, progress: Callable[[int], float] | None = None) -> TrainingModule:
    """Return the module that trains the classifier on features; it shares the weights of the job's model.

    It computes in fp32, without mixup, CutMix and random erasing, which need images.
    """
    found, c = classifier_of(job.model), job.config
    assert found is not None
    lr = c.lr * (c.fallback_lr_scale if is_muon(c) else 1.0)
    config = dataclasses.replace(
        c,
        optimizer="adamw" if is_muon(c) else c.optimizer,
        mixup=0.0,
        cutmix=0.0,
        random_erasing=0.0,
        layer_decay=1.0,
        grad_accum=1,
        precision="fp32",
    )
    return job.module(epochs, 0, lr, nn.Sequential(nn.Dropout(c.drop_rate), found[1]), config, progress)


def why_not(job: Job) -> str | None:
    """Return why the classifier cannot be trained on features computed once, or None."""
    if job.config.freeze != ALL:
        return f"freeze {job.config.freeze} trains more than the classifier"
    if world_size() > 1:
        return "several processes train"
    found = classifier_of(job.model)
    if found is None:
        return "the model has more than one classifier"
    assert job.data.train is not None
    images, *_ = next(iter(_loader(job, job.data.train.subset(np.arange(min(4, len(job.data.train)))), None)))
    needed = 4 * max(1, job.config.views) * len(job.data.train) * _same(job, found, images.to(job.device))
    if not needed:
        return "the classifier is not the model's last layer"
    if needed > available_bytes() / 2:
        return f"{needed / 2**30:.1f} GiB of features do not fit into memory"
    return None


def compute(job: Job) -> Features:
    """Return the features of the training and validation images, from the cache or computed now."""
    assert job.data.train is not None
    began, keep = time.perf_counter(), _Cache(job)
    views: list[int | None] = list(range(job.config.views)) if job.config.views else [None]
    with _trunk(job) as trunk:
        train = [keep.get("train", view, trunk) for view in views]
        val = keep.get("val", None, trunk) if job.data.val else None
    prune(keep.folder.glob("*.safetensors"), CACHE_BYTES)
    count = sum(len(part[1]) for part in (*train, *([val] if val else [])))
    seconds = time.perf_counter() - began
    how = "from the cache" if keep.hits == len(train) + bool(val) else f"computed in {seconds:.1f} s"
    return Features(train, val, f"{count} images, {how}")


def measure(job: Job, most_seconds: float = 10.0) -> tuple[float, float]:
    """Return the seconds to read an image and compute its features, and the seconds of a training step on features.

    Args:
        job: What would be trained.
        most_seconds: Approximate time for measuring.
    """
    assert job.data.train is not None
    loader, parts, began = _loader(job, job.data.train, 0 if job.config.views else None), [], time.perf_counter()
    with _trunk(job) as trunk, torch.no_grad():
        for images, *rest in loader:
            parts.append((trunk(images.to(job.device)).float().cpu(), *rest))
            if time.perf_counter() - began > most_seconds / 2:
                break
    loader.close()
    part = tuple(map(torch.cat, zip(*parts, strict=True)))
    per_image = (time.perf_counter() - began) / len(part[0])
    chosen = torch.arange(job.batch_size) % len(part[0])
    steps = (tuple(values[chosen] for values in part) for _ in itertools.count())
    return per_image, statistics.median(measure_speed(head_module(job, 1.0), steps, 20, most_seconds / 2))


class _Cache:
    """Features in the cache folder; if it cannot be written, nothing is kept.

    Attributes:
        hits: Number of parts found in it.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.hits, self.folder = job, 0, cache_folder("features")
        self.key = _key(job)

    def get(self, split: str, view: int | None, trunk: nn.Module) -> Part:
        """Return features and labels of a split.

        Args:
            split: "train" or "val".
            view: Number of the augmented view; None: the images without augmentation.
            trunk: The model without its classifier.
        """
        images = getattr(self.job.data, split)
        path = self.folder / f"{self._name(split, images, view)}.safetensors"
        found = _read(path)
        if found is not None:
            self.hits += 1
            return found
        loader = self.job.eval_loader("val") if split == "val" else _loader(self.job, images, view)
        assert loader is not None
        part = _pass(trunk, loader, self.job.device)
        content = safetensors.torch.save({str(number): values for number, values in enumerate(part)})
        with contextlib.suppress(OSError):
            write_atomic(path, content)
        return part

    def _name(self, split: str, images: ImageSet, view: int | None) -> str:
        about = hashlib.sha256(f"{self.key} {split} {view}".encode())
        about.update(np.ascontiguousarray(images.indices, np.int64).tobytes())
        about.update(np.ascontiguousarray(images.labels).tobytes())
        about.update(b"" if images.weights is None else images.weights.tobytes())
        if view is not None:
            about.update(json.dumps(_augmentation(self.job.config)).encode())
        return about.hexdigest()[:40]


@contextlib.contextmanager
def _trunk(job: Job) -> Iterator[nn.Module]:
    """Yield the model without its classifier, on the inference kernels if they can be used."""
    found, precision = classifier_of(job.model), job.config.precision
    assert found is not None
    with _without(job.model, found[0]):
        if has_kernels(job.device, precision):
            yield optimize_for_inference(job.model, precision)
        else:
            yield PlainInference(job.model, precision)


@contextlib.contextmanager
def _without(model: nn.Module, name: str) -> Iterator[None]:
    """Replace a module by an identity."""
    module = model.get_submodule(name)
    model.set_submodule(name, nn.Identity())
    try:
        yield
    finally:
        model.set_submodule(name, module)


def _pass(trunk: nn.Module, loader: Loader, device: torch.device) -> Part:
    parts = []
    for images, *rest in track(loader, "computing features", len(loader), shown_from=3):
        parts.append((trunk(images.to(device)).float().cpu(), *rest))
    if not parts:
        raise RequestError("no image of the set can be decoded")
    return tuple(torch.cat(tensors).clone() for tensors in zip(*parts, strict=True))


def _loader(job: Job, images: ImageSet, view: int | None) -> Loader:
    """Return a loader of one view of the images; None: without augmentation."""
    c, p = job.config, job.preprocessing
    workers = c.workers if len(images) > 2000 or (view is not None and len(images) > 200) else 0
    transform = eval_transform(p) if view is None else train_transform(c, p)
    flips = view is not None and c.hflip_mode == "alternate"
    return view_loader(
        images, transform, seed=c.seed, epoch=view or 0, batch_size=BATCH, workers=workers, alternate_flip=flips
    )


@torch.no_grad()
def _same(job: Job, found: tuple[str, nn.Module], images: torch.Tensor) -> int:
    """Return the number of features per image, or 0 if the classifier, applied to them, does not give the model's
    output.
    """
    whole = PlainInference(job.model, "fp32")(images)
    with _without(job.model, found[0]):
        values = PlainInference(job.model, "fp32")(images)
    try:
        again = found[1](values)
    except (RuntimeError, TypeError, ValueError):
        return 0
    close = again.shape == whole.shape and (again - whole).abs().max() <= 1e-3 * whole.abs().max().clamp_min(1e-3)
    return values[0].numel() if close else 0


def _key(job: Job) -> str:
    """Return a digest of what all features of a job depend on; `_Cache._name` adds what differs by split and view."""
    found = classifier_of(job.model)
    assert found is not None
    state = {k: v.detach().cpu() for k, v in job.model.state_dict().items() if not k.startswith(f"{found[0]}.")}
    about = {
        "versions": [__version__, torch.__version__],
        "computed": [job.config.precision, job.device.type, job.kernels],
        "build": job.build,
        "preprocessing": dataclasses.asdict(job.preprocessing),
        "seed": job.config.seed if job.config.views else None,
        "data": _fingerprint(job),
    }
    return digest_weights(state, json.dumps(about, sort_keys=True))


def _fingerprint(job: Job) -> str:
    """Return a digest of the data: its checksum, its bit depth, and the scan's digest of each image."""
    digest = hashlib.sha256(f"{job.data.checksum} {job.data.bits}".encode())
    if job.data.checked:
        for split, scan in sorted(job.data.checked.scans.items()):
            digest.update(split.encode() + scan.digests.tobytes())
    return digest.hexdigest()


def _augmentation(config: Config) -> dict[str, Any]:
    names = "scale ratio train_interpolation pad_crop hflip hflip_mode vflip color_jitter auto_augment"
    return {name: getattr(config, name) for name in names.split()}


def _read(path: Path) -> Part | None:
    try:
        found = safetensors.torch.load_file(path)
        os.utime(path)
        return tuple(found[str(number)] for number in range(len(found)))
    except Exception:  # missing, truncated, or written by another program
        return None
