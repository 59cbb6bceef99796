"""Gives every image one split and one label, and makes missing splits from train.

All randomness comes from the seed. Identical images, and images of one group, always stay in the same split.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from convmixer.data.labels import is_label
from convmixer.data.options import Options
from convmixer.errors import RequestError, shown

TEST_FRACTION = 0.2  # share of train, if the data have no test split
TEST_SEED = 0  # every run has the same test images, so that runs with different seeds can be compared
KEPT_IN = ("test", "val", "train")  # copies stay in the first of these splits that has one, and leave the others


@dataclass(frozen=True)
class Conflicts:
    """Images that are left out because of their copies.

    Args:
        contradicting: Split -> bool (N,): the image has a copy with a different label.
        elsewhere: Split -> bool (N,): a copy of the image stays in another split.
        copies: How many images are copies of others.
        notes: Notes for the user.
    """

    contradicting: dict[str, np.ndarray]
    elsewhere: dict[str, np.ndarray]
    copies: int
    notes: list[str]


def find_conflicts(
    copies: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray], name: Callable[[str, int], str]
) -> Conflicts:
    """Return which images have copies with a different label or in a different split.

    Args:
        copies: Split -> a number per image, int64 (N,), the same for equal images; -1: not known.
        labels: Split -> int64 (N,).
        name: Split and index of an image -> its name.
    """
    order = [split for split in KEPT_IN if split in copies]
    numbers = np.concatenate([copies[split] for split in order])
    classes = np.concatenate([labels[split] for split in order])
    rank = np.repeat(np.arange(len(order)), [len(copies[split]) for split in order])
    known = numbers >= 0
    numbers = np.where(known, numbers, -1 - np.arange(len(numbers)))
    _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    low, high = _spread(inverse, classes)
    contradicting = (low != high)[inverse]
    first, _ = _spread(inverse, rank)
    elsewhere = (rank > first[inverse]) & ~contradicting
    ends = np.cumsum([len(copies[split]) for split in order])[:-1]
    places = [(split, i) for split in order for i in range(len(copies[split]))] if (counts > 1).any() else []

    def some(mask: np.ndarray) -> str:
        pairs = []
        for place in np.flatnonzero(mask)[:3]:
            twin = next(int(i) for i in np.flatnonzero(inverse == inverse[place]) if i != place)
            pairs.append(f"{name(*places[place])} = {name(*places[twin])}")
        return ", ".join(pairs)

    extra = int((counts - 1)[counts > 1].sum())
    notes = []
    stay = ~contradicting & ~elsewhere
    staying = np.bincount(inverse[stay], minlength=len(counts))
    if together := int((staying - 1)[staying > 1].sum()):
        repeated = stay & (staying > 1)[inverse]
        notes.append(
            f"{together} images are copies of others, byte for byte, and stay in one split: {some(repeated)}"
        )
    if elsewhere.any():
        kept = " or ".join(order[i] for i in np.unique(first[inverse][elsewhere]))
        notes.append(f"{int(elsewhere.sum())} images are in two splits: kept in {kept}: {some(elsewhere)}")
    mixed, parted = (dict(zip(order, np.split(mask, ends), strict=True)) for mask in (contradicting, elsewhere))
    return Conflicts(mixed, parted, extra, notes)


def _spread(groups: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and the largest value of each group."""
    count = int(groups.max(initial=-1)) + 1
    low, high = np.full(count, np.iinfo(np.int64).max), np.full(count, -1)
    np.minimum.at(low, groups, values)
    np.maximum.at(high, groups, values)
    return low, high


def group_names(
    options: Options, columns: Mapping[str, Sequence[str]], names: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Return split -> name of each image's group, "" if the image is in no group; {} if `--group` is not given.

    Args:
        options: Its `group` is a column or a regular expression.
        columns: Split -> the cells of the column, if there is such a column.
        names: Split -> the paths of the images.

    Raises:
        RequestError: `group` names no column, and is not a regular expression that matches a path.
    """
    if options.group is None:
        return {}
    if columns:
        return {split: [cell if is_label(cell) else "" for cell in cells] for split, cells in columns.items()}
    try:
        pattern = re.compile(options.group)
    except re.error as error:
        raise RequestError(
            f"--group {options.group!r} is neither a column nor a valid regular expression: {error}"
        ) from error
    found = {split: [_group_of(pattern, path) for path in paths] for split, paths in names.items()}
    if not any(any(groups) for groups in found.values()):
        example = next((path for paths in names.values() for path in paths), "")
        raise RequestError(
            f"--group {options.group!r} is neither a column nor a regular expression that matches a path, "
            f"such as {example!r}"
        )
    return found


def _group_of(pattern: re.Pattern[str], path: str) -> str:
    match = pattern.search(path)
    return "" if match is None else (match[1] if pattern.groups else match[0]) or ""


def check_groups(groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Return notes on the groups.

    Raises:
        RequestError: All images are in one group, or a group is in two of the splits that the data come with.
    """
    if not groups:
        return []
    seen: dict[str, str] = {}
    for split, names in groups.items():
        for name in set(names) - {""}:
            if (other := seen.setdefault(name, split)) != split:
                raise RequestError(
                    f"group {name!r} is in {other} and in {split}: the data's own splits separate images of one group"
                )
    single = sum(name == "" for names in groups.values() for name in names)
    if len(seen) == 1 and not single:
        raise RequestError(
            f"--group puts all images into one group, {shown(next(iter(seen)))!r}: give one that differs"
        )
    note = f"{len(seen)} groups, each in one split"
    return [note + (f"; {single} images belong to no group" if single else "")]


def joined(copies: np.ndarray, groups: Sequence[str] | None) -> np.ndarray:
    """Return a number per image, equal for images that copies or groups connect, even through other images."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = len(copies)
    own = np.arange(count)
    keys = np.where(copies >= 0, copies, copies.max(initial=0) + 1 + own)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    ends = [first[inverse]]
    if groups is not None:
        names = np.array([name or f"\0{i}" for i, name in enumerate(groups)])
        _, first, inverse = np.unique(names, return_index=True, return_inverse=True)
        ends.append(first[inverse])
    rows, columns = np.tile(own, len(ends)), np.concatenate(ends)
    graph = coo_matrix((np.ones(len(rows), bool), (rows, columns)), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    found: np.ndarray = first[inverse]  # numbered by the first image, so that single images keep their order
    return found


def stratified(labels: np.ndarray, fraction: float, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Return which images to hold out: the same share of every class, as far as groups that stay together allow.

    Args:
        labels: int64 (N,).
        fraction: Share of the images, 0 to 1, rounded up; train keeps at least one group of every class.
        seed: Chooses the groups.
        groups: int64 (N,), group number of each image; images with the same number stay together. None: each image is
            a group.

    Returns:
        bool, (N,): True for held out.
    """
    if groups is None:
        groups = np.arange(len(labels))
    names, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    kinds = _commonest(labels, inverse, len(names))
    order = np.random.default_rng(seed).permutation(len(names))
    by_class = order[np.argsort(kinds[order], kind="stable")]
    counts = np.bincount(kinds)
    rank = np.arange(len(names)) - np.repeat(np.cumsum(counts) - counts, counts)
    quantile = (rank + 0.5) / np.repeat(counts, counts)
    quantile[rank == np.repeat(counts, counts) - 1] = np.inf  # each class's last group stays
    wanted = math.ceil(fraction * len(labels) - 1e-9)
    candidates = np.argsort(quantile, kind="stable")
    candidates = by_class[candidates[np.isfinite(quantile[candidates])]]
    chosen = np.zeros(len(names), bool)
    chosen[_fill(candidates, sizes, wanted)] = True
    return chosen[inverse]


def _fill(candidates: np.ndarray, sizes: np.ndarray, wanted: int) -> np.ndarray:
    """Return those candidates that together have about `wanted` images.

    They are taken in order; a group that would exceed `wanted` by more than half its own size is skipped.
    """
    if (sizes == 1).all():
        return candidates[:wanted]
    taken, held = [], 0
    for group in candidates:
        if held < wanted and held + sizes[group] / 2 <= wanted:
            taken.append(group)
            held += sizes[group]
    return np.array(taken, np.int64)


def _commonest(labels: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """Return the commonest label of each group, int64 (count,)."""
    pairs, times = np.unique(np.stack([groups, labels], 1), axis=0, return_counts=True)
    order = np.lexsort((times, pairs[:, 0]))
    found = np.zeros(count, np.int64)
    found[pairs[order, 0]] = pairs[order, 1]  # the last one written is the commonest
    return found
