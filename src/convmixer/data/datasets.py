"""Image sets with their splits: what a run trains on, selects on, is tested on. Nothing is random but by seed.

Unreadable images, in two steps. `load_data` reads the header of every image: what is no image, empty or too large is
named in `bad_files`, left out, and counted against `max_bad_fraction`. Damage behind a good header shows only on
decoding: then training takes the next readable image instead, evaluation leaves the image out, and both mark it in
`ImageSet.failed`, over all worker processes, against the same limit.
"""

import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from convmixer.data.find import find
from convmixer.data.found import Found
from convmixer.data.labels import names_that_differ_in_case
from convmixer.data.options import Options
from convmixer.data.sources import Arrays, Cached, Files, Shards, Source
from convmixer.errors import RequestError
from convmixer.preprocess import IMAGENET_MEAN, IMAGENET_STD, ImageError
from convmixer.progress import track

TEST_FRACTION = 0.2  # of data that come without a test split
TEST_SEED = 0  # the same test images whatever the run's seed, so that runs can be compared
DEFAULT_SIDE = 224  # of data whose images are not square, alike and smaller, pixels
CACHE_BYTES = 1 << 30  # decoded images of one size are kept in memory up to this, all splits together
CACHE_SIDE = 128  # and up to this side, pixels
STATISTICS_IMAGES = 2000  # images that mean and deviation of unknown grey data are computed on
STATISTICS = {  # mean and standard deviation per channel of the training images
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")

Header = tuple[str, tuple[int, int]]


class ImageSet(Dataset[tuple[Image.Image, int]]):
    """Labelled images with random access.

    Args:
        source: The images.
        labels: int64 (N,), a class index per image of the set.
        classes: Class names.
        indices: Which images of the source, (N,); None: all.
        in_chans: 1 for mode L, 3 for mode RGB.
        max_bad: Images that may be marked before reading raises RequestError.
        marks: uint8, 1 for each image that cannot be read, in memory shared with worker processes and with the other
            sets of the data; None: of this source alone, none marked.
        first: Where in `marks` the source's images begin.
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
    ) -> None:
        self.source, self.classes, self.in_chans = source, tuple(classes), in_chans
        self.labels = np.asarray(labels, np.int64)
        self.indices = np.arange(len(source)) if indices is None else np.asarray(indices)
        self.max_bad = max_bad
        self.marks, self.first = _marks([False] * len(source)) if marks is None else marks, first

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return an image and its label; where it cannot be decoded, those of the next one that can.

        Raises:
            RequestError: More than `max_bad` images are marked, or none of this set can be decoded.
        """
        for candidate in range(index, index + len(self)):
            found = self.read(candidate % len(self))
            if found is not None:
                return found
        raise RequestError("no image of the set can be decoded")

    def read(self, index: int) -> tuple[Image.Image, int] | None:
        """Return an image and its label, or None and a mark in `failed` where it cannot be decoded."""
        try:
            image = self.source.image(int(self.indices[index]), self.in_chans)
        except (ImageError, OSError) as error:
            self._fail(index, error)
            return None
        return image, int(self.labels[index])

    def _fail(self, index: int, error: Exception) -> None:
        place = self.first + int(self.indices[index])
        if not self.marks[place]:
            self.marks[place] = 1
            print(f"unreadable image left out: {_told(self.name(index), error)}", file=sys.stderr, flush=True)
        if (count := int(self.marks.sum())) > self.max_bad:
            raise _too_many(count, len(self.marks), self.failed)

    @property
    def failed(self) -> list[str]:
        """Names of the images that could not be decoded so far, in any process."""
        return [self.name(int(i)) for i in np.flatnonzero(self.marks.numpy()[self.first + self.indices])]

    def name(self, index: int) -> str:
        """Return what to call an image."""
        return self.source.name(int(self.indices[index]))

    def subset(self, positions: np.ndarray) -> "ImageSet":
        """Return the set of the images at these positions."""
        return ImageSet(
            self.source,
            self.labels[positions],
            self.classes,
            self.indices[positions],
            self.in_chans,
            self.max_bad,
            self.marks,
            self.first,
        )


@dataclass(frozen=True)
class DataSplits:
    """A data set, ready to train on.

    Args:
        name: What to call it.
        train, val, test: The splits; None where there is none.
        classes: Class names by label.
        img_size: Side to train at, pixels.
        in_chans: 1 or 3.
        mean, std: Per channel, of values from 0 to 1.
        checksum: "sha256:..." of the contents, or "listing-sha256:..." of names and sizes.
        notes: What the user should know, e.g. how splits were made.
        bad_files: "name: reason" of images left out because their header cannot be read.
        spec: The data argument so written that it means the same from every folder.
        options: What the user said about columns, folders and groups.
    """

    name: str
    train: ImageSet | None
    val: ImageSet | None
    test: ImageSet | None
    classes: tuple[str, ...]
    img_size: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    checksum: str
    notes: list[str] = field(default_factory=list)
    bad_files: list[str] = field(default_factory=list)
    spec: str = ""
    options: Options = field(default_factory=Options)


def load_data(
    spec: str,
    *,
    val_fraction: float,
    seed: int,
    max_bad_fraction: float,
    img_size: int | None = None,
    recorded: bool = False,
    hold_out: bool = True,
    options: Options | None = None,
) -> DataSplits:
    """Return the data behind a data argument, split into train, val and test.

    Missing splits are made from train, stratified by class, and `notes` says so: val from `seed`, test always the
    same. With `val_fraction` 0 there is no val split, and data that come with train and val but no test use their val
    as test.

    Args:
        spec: See `argument.read_argument`.
        val_fraction: Share of train, 0 to 1, held out where there is no val split.
        seed: Of the val split.
        max_bad_fraction: Share of unreadable images above which this, or later reading, fails.
        img_size: Side to train at, pixels; None: that of the data, where they are square, alike and
            at most 224, else 224.
        recorded: `spec` was read from weights or a record, not typed: it never asks the hub for a path.
        hold_out: Make missing splits from train. Without it the splits are those that the data come with.
        options: What the user said about columns, folders and groups; None: nothing.

    Raises:
        RequestError: No such data, too many unreadable images, or too few images to split.
    """
    if not 0 <= seed < 2**63:
        raise RequestError(f"seed must be 0 to 2**63 - 1, not {seed}")
    options = (options or Options()).absolute()
    found = find(spec, recorded, options)
    scans = {split: _scan(source) for split, (source, _) in found.splits.items()}
    headers = [h for scan in scans.values() for h in scan if not isinstance(h, str)]
    bad = [_told(found.splits[s][0].name(i), h) for s, scan in scans.items() for i, h in enumerate(scan) if _bad(h)]
    total = sum(len(scan) for scan in scans.values())
    if not headers or len(bad) > max_bad_fraction * total:
        raise _too_many(len(bad), total, bad)
    in_chans = found.in_chans or (1 if all(mode in GREY_MODES for mode, _ in headers) else 3)
    sizes = {size for _, size in headers}
    notes = [*found.notes, *found.unused.notes(), *names_that_differ_in_case(found.classes)]
    max_bad = int(max_bad_fraction * total)
    marks = _marks([_bad(h) for scan in scans.values() for h in scan])
    first = dict(zip(scans, np.cumsum([0] + [len(scan) for scan in scans.values()]), strict=False))
    sets, cache = {}, CACHE_BYTES
    # train first: it is read most
    for split, (source, labels) in sorted(found.splits.items(), key=lambda item: item[0] != "train"):
        good = np.array([i for i, h in enumerate(scans[split]) if not _bad(h)], np.int64)
        if not len(good):
            notes.append(f"split {split} is empty: not used")
            continue
        cached = _cached(source, in_chans, sizes, cache)
        cache -= cached.nbytes if isinstance(cached, Cached) else 0
        sets[split] = ImageSet(cached, labels[good], found.classes, good, in_chans, max_bad, marks, int(first[split]))
    if bad:
        notes.append(f"{len(bad)} of {total} images cannot be read and are left out: {'; '.join(bad[:20])}")
    if hold_out:
        train, val, test = _complete(sets, val_fraction, seed, notes)
    else:
        train, val, test = (sets.get(split) for split in ("train", "val", "test"))
    mean, std = _statistics(found, in_chans, train or test or val, notes)
    if len(found.classes) < 2:
        notes.append(f"there is only one class, {found.classes[0]!r}: expected one folder per class")
    side = img_size or _side(sizes, notes)
    return DataSplits(
        found.name,
        train,
        val,
        test,
        found.classes,
        side,
        in_chans,
        mean,
        std,
        found.checksum,
        notes=notes,
        bad_files=bad,
        spec=found.spec,
        options=options,
    )


def _side(sizes: set[tuple[int, int]], notes: list[str]) -> int:
    """Return the side to train at: that of the images where they are square, alike and not large."""
    width, height = next(iter(sizes))
    if len(sizes) == 1 and width == height <= DEFAULT_SIDE:
        return width
    what = f"images are {width} x {height}" if len(sizes) == 1 else "images differ in size"
    notes.append(f"{what}: used at {DEFAULT_SIDE} pixels; choose with img_size")
    return DEFAULT_SIDE


def stratified(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return which images to hold out: the same share of every class, as nearly as whole images allow.

    Args:
        labels: int64 (N,).
        fraction: Share, 0 to 1; rounded up to whole images, and train keeps at least one of every class.
        seed: Chooses the images.

    Returns:
        bool, (N,): True for held out.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    quantile = (rank + 0.5) / np.repeat(counts, counts)
    quantile[rank == np.repeat(counts, counts) - 1] = np.inf  # each class's last image stays
    wanted = math.ceil(fraction * len(labels) - 1e-9)
    chosen = np.argsort(quantile, kind="stable")[:wanted]
    held = np.zeros(len(labels), bool)
    held[by_class[chosen[np.isfinite(quantile[chosen])]]] = True
    return held


def _complete(
    sets: dict[str, ImageSet], val_fraction: float, seed: int, notes: list[str]
) -> tuple[ImageSet | None, ImageSet | None, ImageSet | None]:
    """Return train, val and test, making from train what is missing."""
    train, val, test = (sets.get(split) for split in ("train", "val", "test"))
    if train is None:
        return None, val, test
    if test is None and val is not None and val_fraction == 0:
        notes.append(f"val ({len(val)} images) serves as test: there is no test split and val_fraction is 0")
        val, test = None, val
    if test is None:
        train, test = _hold_out(train, TEST_FRACTION, TEST_SEED, "test")
        notes.append(f"no test split: {len(test)} images held out of train, the same for every seed")
    if val is None and val_fraction > 0:
        train, val = _hold_out(train, val_fraction, seed, "val")
        notes.append(f"no val split: {len(val)} images held out of train, chosen by seed {seed}")
    notes.append(f"train {len(train)}, val {len(val) if val else 0}, test {len(test)} images")
    return train, val, test


def _hold_out(train: ImageSet, fraction: float, seed: int, split: str) -> tuple[ImageSet, ImageSet]:
    held = stratified(train.labels, fraction, seed)
    if not held.any() or held.all():
        raise RequestError(f"{len(train)} training images are too few to hold a {split} split out; provide one")
    return train.subset(np.flatnonzero(~held)), train.subset(np.flatnonzero(held))


def _scan(source: Source) -> list[Header | str]:
    """Return the header of every image, or why it cannot be read, with a progress bar where it takes long."""
    if isinstance(source, Arrays):
        return [source.header(0)] * len(source) if len(source) else []

    def check(index: int) -> Header | str:
        try:
            return source.header(index)
        except (ImageError, OSError) as error:
            return str(error)

    parts = [range(start, min(start + 256, len(source))) for start in range(0, len(source), 256)]
    # threads wait for the disk; what lies in memory is faster without
    with ThreadPoolExecutor(8 if isinstance(source, (Files, Shards)) else 1) as pool:
        results = pool.map(lambda part: [check(index) for index in part], parts)
        return [header for part in track(results, "checking images", len(parts), shown_from=80) for header in part]


def _bad(header: Header | str) -> bool:
    return isinstance(header, str)


def _told(name: str, problem: object) -> str:
    return str(problem) if name in str(problem) else f"{name}: {problem}"


def _marks(bad: Sequence[bool]) -> torch.Tensor:
    return torch.tensor(bad, dtype=torch.uint8).share_memory_()


def _too_many(count: int, total: int, names: Sequence[str]) -> RequestError:
    """Return the error that `count` images of the data are bad, with some of the names that are known."""
    return RequestError(
        f"{count} of {total} images cannot be read, more than max_bad_fraction allows: "
        f"{'; '.join(names[:5])}{' ...' if count > len(names[:5]) else ''}; remove them, or raise it"
    )


def _cached(source: Source, in_chans: int, sizes: set[tuple[int, int]], limit: int) -> Source:
    """Return the source with a cache where its images are small, of one size and together not above `limit` bytes."""
    if isinstance(source, Arrays) or len(sizes) != 1:
        return source
    width, height = next(iter(sizes))
    small = max(width, height) <= CACHE_SIDE and len(source) * width * height * in_chans <= limit
    return Cached(source, in_chans, (width, height)) if small else source


def _statistics(
    found: Found, in_chans: int, images: ImageSet | None, notes: list[str]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation per channel: the known ones, ImageNet's for colour, computed for grey."""
    if in_chans == 3:
        return STATISTICS.get(found.name, (IMAGENET_MEAN, IMAGENET_STD))
    if images is None or not len(images):
        return (0.5,), (0.5,)
    chosen = np.linspace(0, len(images) - 1, min(len(images), STATISTICS_IMAGES)).astype(int)
    values, counts = np.arange(256) / 255, np.zeros(256)
    for i in chosen:  # one image in memory at a time
        counts += images[int(i)][0].histogram()
    mean = np.average(values, weights=counts)
    std = math.sqrt(np.average((values - mean) ** 2, weights=counts))
    notes.append(f"mean {mean:.4f} and deviation {std:.4f} computed on {len(chosen)} images")
    return (round(float(mean), 4),), (max(round(float(std), 4), 1e-3),)
