"""Data sets with their splits train, val and test. All randomness comes from seeds.

Unusable images are found in two steps. First, `load_data` reads the header of every image. Files that are empty, too
large or not an image, and images with two labels, are named in `bad_files` and left out. Second, damage after the
header is found when an image is decoded. Then training takes the next readable image, and evaluation leaves the image
out. Both list it in `ImageSet.failed`, which all worker processes share. Images of both steps count against
`max_bad_fraction`.
"""

import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from convmixer.data.cache import Cached
from convmixer.data.find import find
from convmixer.data.found import Found
from convmixer.data.images import ImageSet, named, new_marks, too_many
from convmixer.data.labels import doubtful_names
from convmixer.data.options import Options
from convmixer.data.scan import Scan, copies, scan
from convmixer.data.sources import Arrays, Encoded, Source
from convmixer.data.splits import (
    TEST_FRACTION,
    TEST_SEED,
    Conflicts,
    check_groups,
    find_conflicts,
    group_names,
    joined,
    stratified,
)
from convmixer.errors import RequestError
from convmixer.preprocess import BITS, IMAGENET_MEAN, IMAGENET_STD
from convmixer.text import terminal

DEFAULT_SIDE = 224  # pixels; used unless all images are square, of one size and smaller
CACHE_BYTES = 1 << 30  # decoded images of one size are kept in memory up to this size, over all splits
CACHE_SIDE = 128  # largest side of images kept in memory, pixels
STATISTICS_IMAGES = 2000  # images to compute the mean and standard deviation of grey data on
STATISTICS = {  # mean and standard deviation per channel of the training images
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")
ANOTHER_LABEL = "an identical image has a different label"


class TooFewImages(RequestError):
    """There are too few images to hold out a split."""


@dataclass(frozen=True)
class DataSplits:
    """A data set, ready to train on.

    Args:
        name: Name of the data set.
        train, val, test: The splits; None if there is no such split.
        classes: Class names by label.
        img_size: Width and height to train at, pixels.
        in_chans: 1 or 3.
        mean, std: Mean and standard deviation per channel, of values from 0 to 1.
        checksum: "sha256:..." of the contents, or "listing-sha256:..." of names and sizes.
        notes: What the user should know, e.g. how splits were made.
        bad_files: "name: reason" of images left out because their header cannot be read.
        spec: The data argument, made unambiguous, see `argument.Argument`.
        options: What the user said about columns, folders and groups.
        bits: How many bits the values of 16-bit images use.
        found: The images and labels before missing splits are made.
        checked: Results of the check of all images.
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
    bits: int = 16
    found: Found | None = field(default=None, repr=False)
    checked: "Checked | None" = field(default=None, repr=False)


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
    bits: int | None = None,
    test_fraction: float = TEST_FRACTION,
) -> DataSplits:
    """Return the data behind a data argument, split into train, val and test.

    Missing splits are made from train, stratified by class, and `notes` says so. `seed` chooses the val split; the
    test split is the same for every seed. With `val_fraction` 0 no val split is made, and if the data have a val but
    no test split, their val split becomes the test split. With `test_fraction` 0 no test split is made. Identical
    images are always in the same split.

    Args:
        spec: See `argument.read_argument`.
        val_fraction: Share of train, 0 to 1, held out if there is no val split.
        seed: Seed of the val split.
        max_bad_fraction: Largest share of unusable images, 0 to 1. If there are more, this function or later reading
            raises RequestError.
        img_size: Width and height to train at, pixels. None: the size of the images if all are square, of one size
            and at most 224 pixels, else 224.
        recorded: `spec` was read from weights or a record, not typed by the user; see `argument.read_argument`.
        hold_out: Make missing splits from train. If False, only the splits of the data are used.
        options: What the user said about columns, folders and groups; None: nothing.
        bits: How many bits the values of 16-bit images use; None: found out from the images.
        test_fraction: Share of train, 0 to 1, held out if there is no test split.

    Raises:
        RequestError: No such data, too many unusable images, or too few images to split.
    """
    if not 0 <= seed < 2**63:
        raise RequestError(f"seed must be 0 to 2**63 - 1, not {seed}")
    options = (options or Options()).absolute()
    found = find(spec, recorded, options)
    checked = _check(found, options)
    notes = [*found.notes, *found.unused.notes(), *doubtful_names(found.classes), *checked.notes]
    total = sum(len(scan.headers) for scan in checked.scans.values())
    headers = [h for scan in checked.scans.values() for h in scan.headers if not isinstance(h, str)]
    if not headers or len(checked.bad) > max_bad_fraction * total:
        raise too_many(len(checked.bad), total, checked.bad)
    if checked.bad:
        few = "; ".join(checked.bad[:20])
        notes.append(f"{len(checked.bad)} of {total} images cannot be used and are left out: {few}")
        for line in checked.bad[20:]:  # too many for a note: the run's files repeat notes
            print(f"unusable image left out: {terminal(line)}", file=sys.stderr)
    in_chans = found.in_chans or (1 if all(mode in GREY_MODES for mode, _ in headers) else 3)
    sizes = {size for _, size in headers}
    bits = bits or _bits(found, checked, notes)
    sets = _image_sets(found, checked, in_chans, bits, sizes, int(max_bad_fraction * total), notes)
    if hold_out:
        train, val, test = _complete(sets, checked.together, val_fraction, test_fraction, seed, notes)
    else:
        train, val, test = (sets.get(split) for split in ("train", "val", "test"))
    if train and train.weights is not None:
        train.weights = _mean_one(train.weights, options.weight_column, notes)
    mean, std = _statistics(found, in_chans, train or test or val, notes)
    notes += _without_images(train, found.classes)
    if len(found.classes) < 2:
        notes.append(f"there is only one class, {found.classes[0]!r}: expected one folder per class")
    return DataSplits(
        found.name,
        train,
        val,
        test,
        found.classes,
        img_size or _side(sizes, notes),
        in_chans,
        mean,
        std,
        found.checksum,
        notes=notes,
        bad_files=checked.bad,
        spec=found.spec,
        options=options,
        bits=bits,
        found=found,
        checked=checked,
    )


def _without_images(train: ImageSet | None, classes: Sequence[str]) -> list[str]:
    if train is None or not len(none := np.flatnonzero(np.bincount(train.labels, minlength=len(classes)) == 0)):
        return []
    some = ", ".join(repr(classes[i]) for i in none[:5])
    return [f"{len(none)} of {len(classes)} classes have no image in train: {some}{', ...' * (len(none) > 5)}"]


@dataclass(frozen=True)
class Checked:
    """Results of the check of all images, before any is decoded.

    Args:
        scans: Split -> headers and digests.
        usable: Split -> bool (N,): the image is readable, has one label, and is not a copy of one in another split.
        rejected: Split -> bool (N,): the image is unreadable or has two labels.
        together: Split -> int64 (N,): group numbers; images of one group stay in one split.
        bad: "name: reason" of each image that cannot be read or has two labels.
        copies: How many images are copies of others.
        notes: What the user should know.
    """

    scans: dict[str, Scan]
    usable: dict[str, np.ndarray]
    rejected: dict[str, np.ndarray]
    together: dict[str, np.ndarray]
    bad: list[str]
    copies: int
    notes: list[str]


def _check(found: Found, options: Options) -> Checked:
    """Return which images can be used, and which belong together."""
    scans = {split: scan(source) for split, (source, _) in found.splits.items()}
    same = copies([source for source, _ in found.splits.values()], list(scans.values()))
    equal = dict(zip(scans, same, strict=True))

    def name(split: str, index: int) -> str:
        return found.splits[split][0].name(index)

    conflicts = find_conflicts(equal, {split: labels for split, (_, labels) in found.splits.items()}, name)
    if found.name in STATISTICS:  # known benchmarks keep their published splits
        conflicts = _without_consequences(conflicts)
    bad = []
    rejected = {split: known.bad() | conflicts.contradicting[split] for split, known in scans.items()}
    usable = {split: ~(mask | conflicts.elsewhere[split]) for split, mask in rejected.items()}
    for split, mask in rejected.items():
        for i in map(int, np.flatnonzero(mask)):
            header = scans[split].headers[i]
            bad.append(named(name(split, i), header if isinstance(header, str) else ANOTHER_LABEL))
    names = {s: [name(s, i) for i in range(len(k.headers))] for s, k in scans.items()} if options.group else {}
    groups = group_names(options, found.groups, names)
    together = {split: joined(equal[split], groups.get(split)) for split in scans}
    return Checked(
        scans, usable, rejected, together, bad, conflicts.copies, [*conflicts.notes, *check_groups(groups)]
    )


def _without_consequences(conflicts: Conflicts) -> Conflicts:
    nothing = {split: np.zeros_like(mask) for split, mask in conflicts.elsewhere.items()}
    count = int(sum(map(np.count_nonzero, conflicts.elsewhere.values())))
    notes = [f"{count} images are in two splits and stay there: the data are a known benchmark"] if count else []
    return replace(conflicts, contradicting=nothing, elsewhere=nothing, notes=notes)


def _image_sets(
    found: Found,
    checked: Checked,
    in_chans: int,
    bits: int,
    sizes: set[tuple[int, int]],
    max_bad: int,
    notes: list[str],
) -> dict[str, ImageSet]:
    """Return the usable images of every split that has some."""
    marks = new_marks(np.concatenate([checked.rejected[split] for split in found.splits]))
    counts = [len(source) for source, _ in found.splits.values()]
    first = dict(zip(found.splits, np.cumsum([0, *counts]), strict=False))
    sets, room = {}, CACHE_BYTES
    # train first: it is read most
    for split, (source, labels) in sorted(found.splits.items(), key=lambda item: item[0] != "train"):
        usable = np.flatnonzero(checked.usable[split])
        if not len(usable):
            notes.append(f"split {split} is empty: not used")
            continue
        cached = _cached(source, in_chans, sizes, room)
        room -= cached.nbytes if isinstance(cached, Cached) else 0
        start = int(first[split])
        weights = found.weights[split][usable] if found.weights else None
        rest = (usable, in_chans, max_bad, marks, start, bits, weights)
        sets[split] = ImageSet(cached, labels[usable], found.classes, *rest)
    return sets


def _bits(found: Found, checked: Checked, notes: list[str]) -> int:
    """Return how many bits the values of 16-bit and 32-bit images use: one number for all of them."""
    deep = [
        (source, i)
        for split, (source, _) in found.splits.items()
        if isinstance(source, Encoded)
        for i in map(int, np.flatnonzero(checked.usable[split]))
        if checked.scans[split].headers[i][0].startswith("I")
    ]
    if not deep:
        return 16
    chosen = [deep[i] for i in np.linspace(0, len(deep) - 1, min(len(deep), STATISTICS_IMAGES)).astype(int)]
    with ThreadPoolExecutor(8) as pool:
        most = max(pool.map(lambda place: place[0].brightest(place[1]), chosen))
    bits = next((bits for bits in BITS if most < 1 << bits), 16) if most else 16
    kept = "upper byte" if bits == 16 else f"values are taken as {bits}-bit ones, in the weights too"
    notes.append(f"{len(deep)} images have 16 or 32 bits, the largest value of {len(chosen)} is {most}: {kept}")
    return bits


def _side(sizes: set[tuple[int, int]], notes: list[str]) -> int:
    """Return the width and height to train at: the images' own if they are square, of one size and not large."""
    width, height = next(iter(sizes))
    if len(sizes) == 1 and width == height <= DEFAULT_SIDE:
        return width
    what = f"images are {width} x {height}" if len(sizes) == 1 else "images differ in size"
    notes.append(f"{what}: used at {DEFAULT_SIDE} pixels; choose with img_size")
    return DEFAULT_SIDE


def _complete(
    sets: dict[str, ImageSet],
    together: dict[str, np.ndarray],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    notes: list[str],
) -> tuple[ImageSet | None, ImageSet | None, ImageSet | None]:
    """Return train, val and test, making from train what is missing."""
    train, val, test = (sets.get(split) for split in ("train", "val", "test"))
    if train is None:
        return None, val, test
    if test is None and val is not None and val_fraction == 0 < test_fraction:
        notes.append(f"val ({len(val)} images) is used as test: there is no test split and val_fraction is 0")
        val, test = None, val
    if test is None and test_fraction > 0:
        train, test = _hold_out(train, together["train"], test_fraction, TEST_SEED, "test")
        notes.append(f"no test split: {len(test)} images held out of train, the same for every seed")
    if val is None and val_fraction > 0:
        train, val = _hold_out(train, together["train"], val_fraction, seed, "val")
        notes.append(f"no val split: {len(val)} images held out of train, chosen by seed {seed}")
    notes.append(f"train {len(train)}, val {len(val) if val else 0}, test {len(test) if test else 0} images")
    return train, val, test


def _mean_one(weights: np.ndarray, column: str | None, notes: list[str]) -> np.ndarray:
    """Return weights divided by their mean, so that the mean loss keeps its size."""
    if not (mean := float(weights.mean(dtype=np.float64))):
        raise RequestError(f"column {column!r}: the weights of all training images are 0")
    notes.append(
        f"training images have the weights of column {column!r} in the loss, from {weights.min() / mean:.3g} to "
        f"{weights.max() / mean:.3g} times the mean"
    )
    scaled: np.ndarray = (weights / mean).astype(np.float32)
    return scaled


def _hold_out(
    train: ImageSet, together: np.ndarray, fraction: float, seed: int, split: str
) -> tuple[ImageSet, ImageSet]:
    held = stratified(train.labels, fraction, seed, together[train.indices])
    if not held.any() or held.all():
        groups, classes = len(np.unique(together[train.indices])), len(set(train.labels.tolist()))
        apart = f" in {groups} groups" if groups < len(train) else ""
        raise TooFewImages(
            f"{len(train)} training images{apart} of {classes} classes are too few to hold out a {split} split, "
            f"since train keeps one{' group' if apart else ''} of each class: provide a {split} split"
        )
    return train.subset(np.flatnonzero(~held)), train.subset(np.flatnonzero(held))


def _cached(source: Source, in_chans: int, sizes: set[tuple[int, int]], limit: int) -> Source:
    """Return the source, with a cache if its images are small, of one size and together at most `limit` bytes."""
    if isinstance(source, Arrays) or len(sizes) != 1:
        return source
    width, height = next(iter(sizes))
    small = max(width, height) <= CACHE_SIDE and len(source) * width * height * in_chans <= limit
    return Cached(source, in_chans, np.full((len(source), 2), (width, height))) if small else source


def _statistics(
    found: Found, in_chans: int, images: ImageSet | None, notes: list[str]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel: for grey images computed on train, for colour those of the
    known data set, or else ImageNet's.
    """
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
    notes.append(f"mean {mean:.4f} and standard deviation {std:.4f} computed on {len(chosen)} images")
    return (round(float(mean), 4),), (max(round(float(std), 4), 1e-3),)
