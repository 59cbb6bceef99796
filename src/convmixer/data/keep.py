"""Decides whether the photos of a run are kept decoded, and where: `--cache`.

Validation images are kept as the model gets them, so validation results are the same, bit for bit. Training images
are shrunk before they are kept, but the smallest random crop still has the input resolution. The crop resizes shrunk
images a second time, and a note says so.
"""

import functools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import __version__ as pil_version

from convmixer.config import Config
from convmixer.data.argument import read_argument
from convmixer.data.cache import Cached, Fit, cache_file, least_side, make_room, shrink, shrunk, slots_bytes
from convmixer.data.datasets import DataSplits
from convmixer.data.images import ImageSet
from convmixer.data.sources import Encoded, Files
from convmixer.data.transforms import train_transform
from convmixer.data.watch import listing, status_hash
from convmixer.device import available_bytes
from convmixer.preprocess import Preprocessing, resize_and_crop

MEMORY_SHARE = {"auto": 0.25, "memory": 0.8}  # of the free memory
DISK_SHARE = {"auto": 0.1, "disk": 0.5}  # of the free disk
DOMINATES = 0.4  # "auto" keeps images if decoding takes more than this share of loading them
PROBED = 8  # images


@dataclass(frozen=True)
class Kept:
    """The images of a run that are kept decoded.

    Args:
        where: "memory", "disk" or "off": where the images are kept.
        sets: "train" and "val" -> the images that are kept; empty if no images are kept.
        notes: Notes for the user.
    """

    where: str
    sets: dict[str, ImageSet]
    notes: list[str]


def keep_decoded(config: Config, data: DataSplits, p: Preprocessing) -> Kept:
    """Return the images of a run, kept as the setting `cache` says.

    If the chosen place has no room, images are shrunk in the same way but not kept, and a note says so.
    """
    train, how = data.train, config.cache
    if how == "off" or train is None or not isinstance(train.source, Encoded):
        return Kept("off", {}, [])  # small images of one size are kept in any case
    once = config.epochs == 1 or (
        config.freeze == "all" and not config.unfreeze_epochs
    )  # 0: as many as a fixed time allows
    if how == "auto" and (once or not _dominates(config, train, p)):
        return Kept("off", {}, [])
    plans = _plans(config, data, p)
    size = sum(plan.size() for plan in plans.values())
    wanted = ("memory", "disk") if how == "auto" else (how,)
    where = next((place for place in wanted if _fits(place, how, plans)), None)
    if where is None and how == "auto":
        return Kept(
            "off", {}, [f"{_amount(size)} of decoded images do not fit in memory: each epoch decodes them again"]
        )
    try:
        sets = {name: plan.kept(where) for name, plan in plans.items()}
    except OSError:
        where, sets = None, {name: plan.kept(None) for name, plan in plans.items()}
    return Kept(where or how, sets, [_words(how, where, size, plans["train"])])


def _dominates(config: Config, images: ImageSet, p: Preprocessing) -> bool:
    """Return whether decoding takes most of the computing time of loading an image."""
    transform, side = train_transform(config, p), least_side(p.img_size, config.scale, config.ratio)
    decoding = total = 0.0
    for index in np.linspace(0, len(images) - 1, min(PROBED, len(images))).astype(int):
        start = time.thread_time()
        found = images.read(int(index))
        if found is None:
            continue
        small = shrink(found[0], side)
        decoding += time.thread_time() - start
        transform(small)
        total += time.thread_time() - start
    return decoding > DOMINATES * total


def _plans(config: Config, data: DataSplits, p: Preprocessing) -> "dict[str, _Plan]":
    side = least_side(p.img_size, config.scale, config.ratio)
    plans = {"train": _Plan(data, "train", functools.partial(shrink, side=side), f"shorter side {side}", side)}
    if data.val is not None and isinstance(data.val.source, Encoded):
        plans["val"] = _Plan(data, "val", functools.partial(resize_and_crop, p=p), f"squares {p}", side, p.img_size)
    return plans


def _fits(place: str, how: str, plans: "dict[str, _Plan]") -> bool:
    if place == "memory":
        return sum(plan.size() for plan in plans.values()) <= MEMORY_SHARE[how] * available_bytes()
    try:
        return all(make_room(plan.file(), plan.file_bytes(), DISK_SHARE[how]) for plan in plans.values())
    except OSError:
        return False


def _words(how: str, where: str | None, size: int, plan: "_Plan") -> str:
    kept = f"{_amount(size)} of decoded images are kept {'on disk' if where == 'disk' else 'in memory'}"
    if where is None:
        kept = f"there is no room for {_amount(size)} of decoded images ({how}): each epoch decodes them again"
    reduced = int((plan.shorter[plan.images.indices] > plan.side).sum())
    if not reduced:
        return f"{kept}; pixels are the same as without --cache"
    return f"{kept}; {reduced} training images are first made {plan.side} px on the shorter side"


def _amount(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


def _listed(source: Files) -> str:
    """Return a hash of the names, sizes and times of a source's files; a table's files are not below its path."""
    return status_hash(source.root, [source.name(index) for index in range(len(source))])


class _Plan:
    """How the images of a split are kept.

    Args:
        data: The data.
        name: "train" or "val".
        fit: Turns a decoded image into the image that is kept.
        made: What `fit` does, in words, for the name of the file.
        side: Shorter side to which `fit` shrinks images, pixels.
        square: Side of the squares that `fit` makes, pixels; None: it makes no squares.
    """

    def __init__(
        self, data: DataSplits, name: str, fit: Fit, made: str, side: int, square: int | None = None
    ) -> None:
        assert data.found
        assert data.checked
        self.data, self.fit, self.made, self.side, self.square = data, fit, made, side, square
        self.images: ImageSet = getattr(data, name)
        self.split = next(s for s, (source, _) in data.found.splits.items() if source is self.images.source)
        headers = data.checked.scans[self.split].headers
        self.stored = [header[1] if not isinstance(header, str) else (0, 0) for header in headers]
        self.shorter = np.array(self.stored).min(axis=1)

    def sizes(self) -> np.ndarray:
        """Return the (width, height) of each image of the split as it is kept."""
        square = (self.square, self.square)
        kept = [(square if self.square else shrunk(size, self.side)) if size[0] else size for size in self.stored]
        return np.array(kept, np.int64)

    def used(self) -> np.ndarray:
        """Return the sizes of the images that this run uses, and 0 for the others of the split."""
        sizes, used = self.sizes(), np.zeros((len(self.stored), 2), np.int64)
        used[self.images.indices] = sizes[self.images.indices]
        return used

    def size(self) -> int:
        """Return the total size of the images that this run uses, in bytes."""
        return int(self.used().prod(axis=1).sum()) * self.data.in_chans

    def file_bytes(self) -> int:
        """Return the size of the file in bytes. It has room for all images: another seed chooses other images."""
        return slots_bytes(self.sizes(), self.data.in_chans)

    def file(self) -> Path:
        """Return the path of the file for the data in their current state."""
        source = self.images.source
        state = _listed(source) if isinstance(source, Files) else listing(read_argument(self.data.spec).path)
        return cache_file(
            [state or self.data.checksum, self.split, self.made, self.data.in_chans, self.data.bits, pil_version]
        )

    def kept(self, where: str | None) -> ImageSet:
        """Return the images, kept in memory, on disk, or (`where` None) shrunk in the same way but not kept.

        Raises:
            OSError: There is no room.
        """
        file, sizes = (self.file(), self.sizes()) if where == "disk" else (None, self.used())
        images, stored = self.images, where is not None
        return images.with_source(Cached(images.source, images.in_chans, sizes, self.fit, file, stored))
