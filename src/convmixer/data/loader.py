"""Loaders of transformed images: endless batches for training, and all images once for evaluation."""

import copy
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from convmixer.data.images import ImageSet
from convmixer.data.pace import Pace, Place, places
from convmixer.data.sampler import Key, KeyedBatchSampler, is_flipped, sample_seed, seed_everything
from convmixer.data.transforms import Transform
from convmixer.errors import RequestError

_END, _FAILED = object(), object()
Batches = KeyedBatchSampler | Sequence[Sequence[Any]]


class Loader:
    """Batches of a data set, made in worker processes or in this process; `pace` chooses, and the loader says so.

    If a worker raises RequestError, the loader raises it unchanged.

    Args:
        dataset: The images.
        batch_sampler: Which images are in which batch.
        workers: Worker processes, 0: none; or "auto": as many as help.

    Attributes:
        say: Called with a line for each decision; None: nothing is said.
    """

    def __init__(self, dataset: Dataset[Any], batch_sampler: Batches, workers: int | str) -> None:
        if isinstance(workers, int) and workers < 0:
            raise RequestError(f"workers must be 0 or more, not {workers}")
        self.dataset, self.batch_sampler = dataset, batch_sampler
        keyed = isinstance(batch_sampler, KeyedBatchSampler)
        size = batch_sampler.batch_size if keyed else max(map(len, batch_sampler), default=0)  # type: ignore[union-attr]
        self.pace = Pace(places(workers, torch.cuda.is_available()), size, climbs=workers == "auto")
        self.say: Callable[[str], None] | None = None
        self._waited, self._paused = 0.0, False
        self._kept: tuple[Place, DataLoader[Any]] | None = None  # its workers live on between two passes
        self._source: Any = None

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]

    @property
    def waited_seconds(self) -> float:
        """Seconds spent waiting for batches since this was last set.

        Setting it also says that the time since the last batch was not spent on training.
        """
        return self._waited

    @waited_seconds.setter
    def waited_seconds(self, seconds: float) -> None:
        self._waited, self._paused = seconds, True

    def __iter__(self) -> Iterator[Any]:
        done, source = 0, [self._open(0)]
        while True:
            start = time.perf_counter()
            try:
                batch = next(source[0], _END)
            except RuntimeError as error:  # PyTorch has no more specific class for these
                self._give_up_place(error, time.perf_counter() - start)
                batch = _FAILED
            if batch is _FAILED:
                source = self._reopened(source, done)
                continue
            waited = time.perf_counter() - start
            self._waited += waited
            if batch is _END:
                return
            if isinstance(batch, RequestError):
                raise batch
            done, self._paused = done + 1, False
            if batch is not None:  # None: no image of the batch could be decoded
                yield batch
            changed = not self._paused and self.pace.note(waited, time.perf_counter() - start)
            if self.say and (line := self.pace.take_line()):
                self.say(line)
            if changed:
                source = self._reopened(source, done)

    def _reopened(self, source: list[Iterator[Any]], done: int) -> list[Iterator[Any]]:
        """Return an iterator over the batches from number `done` on, in a list, made in the place chosen now.

        The old iterator, in `source`, is freed in a thread, because ending its workers may take seconds.
        """
        new = [self._open(done)]
        threading.Thread(target=source.clear).start()
        return new

    def _give_up_place(self, error: RuntimeError, waited: float) -> None:
        """Choose another place because of an error of PyTorch's loader."""
        if "DataLoader timed out" in str(error):
            self._waited += waited
            self.pace.note_nothing(waited)
        elif "Bus error" in str(error) or "shared memory" in str(error):
            self.pace.without_workers("worker processes have too little shared memory (/dev/shm)")
        else:
            raise error

    def _open(self, done: int) -> Iterator[Any]:
        """Return an iterator over the batches from number `done` on, made in the place that is chosen now."""
        place = self.pace.place
        if done or not self._kept or self._kept[0] != place:
            timeout = self.pace.patience() if place.workers else 0
            given = {"batch_sampler": self._after(done), "collate_fn": _collate, "timeout": timeout}
            loader = DataLoader(self.dataset, **given, **_workers(place))
            self._kept = None if done else (place, loader)
        else:
            loader = self._kept[1]
        with warnings.catch_warnings():  # Python 3.12 and newer; the workers use none of the parent's threads
            warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
            self._source = iter(loader)
        return self._source

    def close(self) -> None:
        """End the worker processes now.

        Otherwise they live as long as the loader, and keep copies of all files that were open in this process when
        they started, such as pipes to other programs.
        """
        if hasattr(self._source, "_shutdown_workers"):  # PyTorch offers no public way
            self._source._shutdown_workers()
        self._source = self._kept = None

    def _after(self, done: int) -> Any:
        if not done:
            return self.batch_sampler
        if not isinstance(self.batch_sampler, KeyedBatchSampler):
            return self.batch_sampler[done:]
        rest = copy.copy(self.batch_sampler)
        rest.start_step += done
        return rest


def train_loader(
    image_set: ImageSet,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    steps_per_epoch: int | None = None,
    workers: int | str = 0,
    rank: int = 0,
    world: int = 1,
    alternate_flip: bool = False,
    odds: np.ndarray | None = None,
    kind: Callable[..., Loader] = Loader,
) -> Loader:
    """Return endless training batches that depend only on seed and global step, not on the number of workers.

    Reading a batch with `workers=0` reseeds the global random generators of this process.

    Args:
        image_set: The images.
        transform: See `transforms.train_transform`.
        batch_size: Images per step in this process.
        seed: Seed of order and augmentation.
        start_step: Global step of the first batch; set `loader.batch_sampler.start_step` before iterating again.
        steps_per_epoch: Steps in an epoch; None: as many as the images fill.
        workers: Worker processes; 0: none; "auto": as many as help.
        rank, world: Index of this process, and the number of processes. Together, the processes read the same batches
            as a single process.
        alternate_flip: Mirror each image in every other epoch, see `sampler.is_flipped`.
        odds: See `sampler.KeyedBatchSampler`.
        kind: The class of the loader.

    Returns:
        A loader of float32 (B, C, H, W), int64 (B,) and, if the images have weights, float32 (B,).

    Raises:
        RequestError: The set is smaller than a batch.
    """
    if len(image_set) < batch_size * world:
        raise RequestError(
            f"{len(image_set)} training images do not fill a batch of {batch_size * world}: "
            f"set batch_size to {len(image_set)} or less"
        )
    most = len(image_set) // (batch_size * world)
    if steps_per_epoch is not None and not 1 <= steps_per_epoch <= most:
        raise RequestError(f"steps_per_epoch must be 1 to {most} for {len(image_set)} images, not {steps_per_epoch}")
    steps = steps_per_epoch or most
    sampler = KeyedBatchSampler(len(image_set), batch_size, seed, start_step, steps, rank, world, odds)
    images = TrainImages(image_set, transform, seed, alternate_flip)
    return kind(images, sampler, workers)


def view_loader(
    image_set: ImageSet,
    transform: Transform,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    workers: int | str = 0,
    alternate_flip: bool = False,
) -> Loader:
    """Return a loader of all images, once and in order, each augmented as `train_loader` does in an epoch.

    Args are those of `train_loader`. An image that cannot be decoded is replaced by the next one, with its label.
    """
    keys = [(epoch, index) for index in range(len(image_set))]
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    return Loader(TrainImages(image_set, transform, seed, alternate_flip), batches, workers)


def eval_loader(
    image_set: ImageSet, transform: Transform, batch_size: int, workers: int | str = 0, rank: int = 0, world: int = 1
) -> Loader:
    """Return a loader of all images, once and in order, or of every world-th one.

    Images that cannot be decoded are left out and listed in `image_set.failed`; a batch may then be smaller.

    Args:
        image_set: The images.
        transform: See `transforms.eval_transform`.
        batch_size: Images per batch.
        workers: Worker processes; 0: none; "auto": as many as help.
        rank, world: Index of this process, and the number of processes; process r reads the images r, r + world, ...

    Returns:
        A loader of float32 (B, C, H, W) and int64 (B,).
    """
    indices = list(range(rank, len(image_set), world))
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    return Loader(EvalImages(image_set, transform), batches, workers)


def _workers(place: Place) -> dict[str, Any]:
    return {
        "num_workers": place.workers,
        "persistent_workers": place.workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": partial(_start_worker, yields=place.yields),
    }


def _start_worker(worker: int, yields: bool) -> None:
    """Set up a worker process.

    The worker leaves the process group, so that a signal to the group (Ctrl-C, `timeout`) reaches only the training
    process, which ends its workers itself. If it `yields`, it gets the lowest priority. It opens new output streams:
    at the fork, a thread of the training process, such as the one that draws the progress bar, may hold the lock of
    the old streams, and the worker's copy of that lock would never be released.
    """
    sys.stdout, sys.stderr = (os.fdopen(file, "w", buffering=1, errors="replace", closefd=False) for file in (1, 2))
    if os.name == "posix":
        os.setpgid(0, 0)
        if yields:
            os.nice(19)


class TrainImages(Dataset[Any]):
    """Transformed images, labels and weights by (epoch, index), each image with its own random numbers."""

    def __init__(self, image_set: ImageSet, transform: Transform, seed: int, alternate_flip: bool = False) -> None:
        self.image_set, self.transform, self.seed = image_set, transform, seed
        self.alternate_flip = alternate_flip

    def __getitem__(self, key: Key) -> tuple[Any, ...] | RequestError:
        epoch, index = key
        seed_everything(sample_seed(self.seed, epoch, index))
        return _guard(lambda: self._read(epoch, index))

    def _read(self, epoch: int, index: int) -> tuple[Any, ...]:
        image, position = self.image_set.next_readable(index)
        if self.alternate_flip and is_flipped(self.seed, epoch, index):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        label, weights = int(self.image_set.labels[position]), self.image_set.weights
        made = self.transform(image), label
        return made if weights is None else (*made, float(weights[position]))


class EvalImages(Dataset[Any]):
    """Transformed images by index; None if one cannot be decoded."""

    def __init__(self, image_set: ImageSet, transform: Transform) -> None:
        self.image_set, self.transform = image_set, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int] | RequestError | None:
        return _guard(lambda: self._read(index))

    def _read(self, index: int) -> tuple[Tensor, int] | None:
        found = self.image_set.read(index)
        return None if found is None else (self.transform(found[0]), found[1])


def _guard(read: Callable[[], Any]) -> Any:
    """Return a RequestError instead of raising it: a worker would wrap it in a long traceback."""
    try:
        return read()
    except RequestError as error:
        return error


def _collate(items: Sequence[Any]) -> Any:
    for item in items:
        if isinstance(item, RequestError):
            return item
    kept = [item for item in items if item is not None]
    if not kept:
        return None
    images, labels, *weights = zip(*kept, strict=True)
    batch = torch.stack(images), torch.tensor(labels, dtype=torch.int64)
    return (*batch, torch.tensor(weights[0], dtype=torch.float32)) if weights else batch
