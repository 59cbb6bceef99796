"""Image folders: the name of a class folder is the label of the images in it, at any depth."""

from collections.abc import Sequence

import numpy as np

from convmixer.data.argument import SHARDS, TABLES
from convmixer.data.found import Found, listing_checksum, to_bytes
from convmixer.data.labels import encode_labels, split_of
from convmixer.data.layout import Folder, Layout, arrange
from convmixer.data.sources import Files, Source
from convmixer.data.status import file_status
from convmixer.data.unused import NO_IMAGE, Unused
from convmixer.data.walk import Walk, is_image
from convmixer.errors import RequestError
from convmixer.preprocess import SUFFIXES

A_TABLE = "a table (the labels are the names of folders)"
A_SHARD = "a shard (the images are in folders)"
EMPTY = "a folder without images"


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
    unused.add(EMPTY, *walked.empty)
    unused.update(walked.unused)
    roots = {split: walked.root.joinpath(*_prefix(layout, split)) for split in images}
    classes, encoded = encode_labels({split: labels for split, (_, labels) in images.items()})
    status = {split: file_status(roots[split], paths) for split, (paths, _) in images.items()}
    sizes = [f"{s}/{p} {n}" for s, (paths, _) in images.items() for p, n in zip(paths, status[s][:, 0], strict=True)]
    splits: dict[str, tuple[Source, np.ndarray]] = {
        s: (Files(roots[s], to_bytes(paths), status[s]), encoded[s]) for s, (paths, _) in images.items()
    }
    return Found(name, splits, classes, listing_checksum(sizes), notes=layout.notes, unused=unused)


def count_class_folders(files: Sequence[str]) -> int:
    """Return how many folders look like classes: they hold images, and their names do not name a split."""
    tops = {tuple(path.split("/")[:-1]) for path in files if is_image(path)}
    return len({(folder[1:2] if split_of(folder[0])[1] else folder[:1]) for folder in tops if folder} - {()})


def _prefix(layout: Layout, split: str) -> Folder:
    return layout.splits["" if layout.inside else split]


def _by_folder(files: Sequence[str], unused: Unused) -> dict[Folder, list[str]]:
    """Return the names of images by folder, in the order of the files; count the other files."""
    folders: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {NO_IMAGE: [], A_TABLE: [], A_SHARD: []}
    for path in files:
        folder, _, file = path.rpartition("/")
        if is_image(file):
            folders.setdefault(folder, []).append(file)
        else:
            ending = file[file.rfind(".") :].lower()
            others[A_TABLE if ending in TABLES else A_SHARD if ending in SHARDS else NO_IMAGE].append(path)
    for reason, names in others.items():
        unused.add(reason, *names)
    return {tuple(folder.split("/")) if folder else (): names for folder, names in folders.items()}


def _nothing(walked: Walk) -> str:
    """Return the error message for a folder that has no images in class folders."""
    tables = [file for file in walked.files if file.lower().endswith(TABLES)]
    hint = f"; to take the labels from a table give it: {walked.root / tables[0]}" if tables else ""
    passed = f" ({'; '.join(walked.unused.notes())})" if walked.unused.counts else ""
    return (
        f"no images in class folders in {walked.root}: expected <class>/*.jpg or train|val|test/<class>/*.jpg "
        f"({', '.join(sorted(SUFFIXES))}){hint}{passed}"
    )
