"""Image folders: the name of a class folder is the label of the images in it, at any depth."""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from convmixer.data.argument import ARCHIVES, SHARDS, TABLES
from convmixer.data.found import Found, listing_checksum, to_bytes
from convmixer.data.labels import SPLIT_WORDS, encode_labels, split_of
from convmixer.data.layout import GENERIC, NAMELESS, Folder, Layout, arrange
from convmixer.data.sources import Files, Source
from convmixer.data.status import file_status
from convmixer.data.unused import NO_IMAGE, Unused
from convmixer.data.walk import Walk, is_image
from convmixer.errors import RequestError
from convmixer.preprocess import SUFFIXES

A_TABLE = "a table (the labels are the names of folders)"
A_LIST = "a list of images, labels or splits; to use it, make a table of it"
EXAMPLE = "a .csv with a row path,label or path,label,split for each image"
LISTS = ("txt", "json", "jsonl", "xml", "mat", "xlsx")
LIST_WORDS = {"labels", "label", "imagelabels", "annotations", "metadata", "images", "list", "class", "split"}
A_SHARD = "a shard (the images are in folders)"
EMPTY = "a folder without images"
_MASK = re.compile(r"(.+?)[-_ ](mask|segmentation|seg|gt)([-_ ]?\d+)?", re.IGNORECASE | re.DOTALL)


def find_folder(walked: Walk, name: str) -> Found:
    """Return the images of class folders, with split folders around or inside them, see `layout.arrange`.

    Raises:
        RequestError: There are no images in class folders, or folders could be either splits or classes.
    """
    unused = Unused()
    folders = _by_folder(walked.files, unused)
    layout = arrange({folder: len(names) for folder, names in folders.items()})
    images: dict[str, tuple[list[str], list[str]]] = {split: ([], []) for split in layout.splits if split}
    for folder, names in folders.items():
        place = layout.place(folder)
        if isinstance(place, str):
            unused.add(place, *("/".join((*folder, file)) for file in names))
            continue
        split, inside = place
        paths, labels = images.setdefault(split, ([], []))
        paths += ("/".join((*inside, file)) for file in names)
        labels += [inside[0]] * len(names)
    if not any(paths for paths, _ in images.values()):
        raise RequestError(_nothing(walked))
    found = {name for _, labels in images.values() for name in labels}
    if nameless := sorted(name for name in found if name.lower() in NAMELESS and len(found) < 3):
        raise RequestError(f"the folder {nameless[0]!r} names no class: {_expected(walked)}")
    unused.add(EMPTY, *walked.empty)
    unused.update(walked.unused)
    roots = {split: walked.root.joinpath(*_prefix(layout, split)) for split in images}
    classes, encoded = encode_labels({split: labels for split, (_, labels) in images.items()})
    status = {split: file_status(roots[split], paths) for split, (paths, _) in images.items()}
    sizes = [f"{s}/{p} {n}" for s, (paths, _) in images.items() for p, n in zip(paths, status[s][:, 0], strict=True)]
    splits: dict[str, tuple[Source, np.ndarray]] = {
        s: (Files(roots[s], to_bytes(paths), status[s]), encoded[s]) for s, (paths, _) in images.items()
    }
    notes = [*layout.notes, *_below_classes(layout, folders), *_masks(folders)]
    return Found(name, splits, classes, listing_checksum(sizes), notes=notes, unused=unused)


def _below_classes(layout: Layout, folders: Iterable[Folder]) -> list[str]:
    """Return a note if class folders hold folders, because the user may mean these as classes."""
    places = [place[1] for folder in folders if not isinstance(place := layout.place(folder), str)]
    depth = 2 if layout.inside else 1
    deeper = [inside for inside in places if len(inside) > depth and inside[depth] not in GENERIC]
    below = sorted({"/".join(inside[: depth + 1]) for inside in deeper})
    if not below:
        return []
    some = ", ".join(below[:5]) + (", ..." if len(below) > 5 else "")
    return [f"{len(below)} folders inside class folders count as their class: {some}"]


def count_class_folders(files: Sequence[str]) -> int:
    """Return how many folders look like classes: they hold images, and their names do not name a split."""
    tops = {tuple(path.split("/")[:-1]) for path in files if is_image(path)}
    return len({(folder[1:2] if split_of(folder[0])[1] else folder[:1]) for folder in tops if folder} - {()})


def _prefix(layout: Layout, split: str) -> Folder:
    return layout.splits["" if layout.inside else split]


def _by_folder(files: Sequence[str], unused: Unused) -> dict[Folder, list[str]]:
    """Return the names of images by folder, in the order of the files; count the other files."""
    folders: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {NO_IMAGE: [], A_TABLE: [], A_LIST: [], A_SHARD: []}
    for path in files:
        folder, _, file = path.rpartition("/")
        if is_image(file):
            folders.setdefault(folder, []).append(file)
        else:
            ending = file[file.rfind(".") :].lower()
            kind = A_TABLE if ending in TABLES else A_SHARD if ending in SHARDS else NO_IMAGE
            others[A_LIST if not folder and _is_list(file) else kind].append(path)
    for reason, names in others.items():
        unused.add(reason, *names)
    return {tuple(folder.split("/")) if folder else (): names for folder, names in folders.items()}


def _masks(folders: Mapping[Folder, Sequence[str]]) -> list[str]:
    """Return a note if images are named like masks of other images."""
    found = []
    for folder, names in folders.items():
        stems = {name.rpartition(".")[0] for name in names}
        masks = (name for name in names if (own := _MASK.fullmatch(name.rpartition(".")[0])) and own[1] in stems)
        found += ["/".join((*folder, name)) for name in masks]
    return [f"{len(found)} images are named like masks of others, but count as images: {found[0]}"] if found else []


def _nothing(walked: Walk) -> str:
    """Return the error message for a folder that has no images in class folders."""
    passed = f" ({'; '.join(walked.unused.notes())})" if walked.unused.counts else ""
    return f"no images in class folders in {walked.root}: {_expected(walked)}{passed}"


def _expected(walked: Walk) -> str:
    """Return the layout that is expected, and what else in the folder could be given as the data."""
    tables = [file for file in walked.files if file.lower().endswith(TABLES)]
    tables.sort(key=lambda file: split_of(file.rpartition("/")[2])[0] != "train")
    hint = (
        f"; to take the labels from a table, give the table as the data: {walked.root / tables[0]}" if tables else ""
    )
    archives = [file for file in walked.files if file.lower().endswith(ARCHIVES)]
    hint += f"; {archives[0]} is a compressed archive: unpack it" if archives else ""
    lists = [file for file in walked.files if _is_list(file)]
    hint += f"; {lists[0]} is not read: make a table of it, {EXAMPLE}" if lists else ""
    return f"expected <class>/*.jpg or train|val|test/<class>/*.jpg ({', '.join(sorted(SUFFIXES))}){hint}"


def _is_list(path: str) -> bool:
    """Return whether a file may list images with their labels or splits."""
    stem, _, ending = path.rpartition("/")[2].lower().rpartition(".")
    words = set(re.split(r"[^a-z]+", stem))
    return ending in LISTS and bool(words & (LIST_WORDS | SPLIT_WORDS.keys()))
