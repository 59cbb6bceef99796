"""WebDataset shards: tar files in which the members of one image share a name, NAME.jpg beside NAME.cls."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convmixer.data.found import Found, files_checksum, to_bytes
from convmixer.data.labels import by_split, encode_labels
from convmixer.data.sources import Shards, Source, index_tar, read_range
from convmixer.errors import RequestError
from convmixer.preprocess import SUFFIXES


def find_tars(path: Path, files: Sequence[Path], name: str) -> Found:
    """Return the images of WebDataset shards: NAME.jpg or .png beside NAME.cls."""
    splits: dict[str, tuple[Source, np.ndarray]] = {}
    read = {split: _tar_samples(members) for split, members in by_split(files, path).items()}
    if not any(places for places, _, _, _ in read.values()):
        raise RequestError(
            f"no samples in the tar files of {path}: expected NAME.jpg or NAME.png beside NAME.cls "
            "(images in class folders: unpack them first)"
        )
    classes, encoded = encode_labels({split: labels for split, (_, _, labels, _) in read.items()})
    for split, members in by_split(files, path).items():
        places, names, _, _ = read[split]
        splits[split] = (Shards(members, np.array(places, np.int64).reshape(-1, 3), to_bytes(names)), encoded[split])
    unlabelled = sum(count for _, _, _, count in read.values())
    notes = [f"{unlabelled} images without a .cls member ignored"] if unlabelled else []
    return Found(name, splits, classes, files_checksum(files), notes=notes)


def _tar_samples(tars: Sequence[Path]) -> tuple[list[tuple[int, int, int]], list[str], list[str], int]:
    """Return places and names of the images in shards, their labels, and how many images have none."""
    places, names, labels, unlabelled = [], [], [], 0
    for number, tar in enumerate(tars):
        for sample in index_tar(tar).values():
            images = [member for extension, member in sample.items() if f".{extension}" in SUFFIXES]
            if images and "cls" in sample:
                offset, size, name = images[0]
                places.append((number, offset, size))
                names.append(name)
                labels.append(read_range(tar, *sample["cls"][:2]).decode("utf-8", "replace").strip())
            unlabelled += bool(images) and "cls" not in sample
    return places, names, labels, unlabelled
