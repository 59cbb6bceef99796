"""WebDataset shards: tar files in which the members of one image share a name, such as NAME.jpg and NAME.cls.

The label is in NAME.cls, else in a key of NAME.json, else in NAME.txt if the texts are classes, not captions.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convmixer.data.columns import LABELS, could_be_labels
from convmixer.data.found import Found, files_checksum, to_bytes
from convmixer.data.labels import by_split, encode_labels, is_label
from convmixer.data.options import Options
from convmixer.data.sources import Shards, Source, read_range
from convmixer.data.splits import group_names
from convmixer.data.tar_index import index_tar
from convmixer.data.unused import Unused
from convmixer.data.walk import is_image
from convmixer.errors import RequestError

LABEL_BYTES = 1 << 20  # largest member that holds a label
PROBED = 1000
NO_LABEL = "an image without label"
NO_USE = "a member that is neither an image nor a label"
KEYS = ("label", "cls", "class", *LABELS)

Sample = Mapping[str, Any]  # extension -> (offset, size, name, text), see `index_tar`


@dataclass(frozen=True)
class Members:
    """Which members of a sample are used.

    Args:
        image: Extension of the images; None: any image.
        label: Extension of the members that hold labels.
        key: Key of the label in a .json member, or None.
    """

    image: str | None
    label: str
    key: str | None = None


def find_tars(path: Path, files: Sequence[Path], name: str, options: Options) -> Found:
    """Return the images of WebDataset shards.

    Raises:
        RequestError: There are no labelled images, or it is unclear which member is the image or the label.
    """
    shards = {split: [(tar, index_tar(tar)) for tar in tars] for split, tars in by_split(files, path).items()}
    samples = [(tar, s) for pairs in shards.values() for tar, index in pairs for s in index.values()]
    members, group = _choose(path, samples, options), _group_members(samples, options)
    unused = Unused()
    splits: dict[str, tuple[Source, np.ndarray]] = {}
    texts: dict[str, list[str]] = {}
    names: dict[str, list[str]] = {}
    cells: dict[str, list[str]] = {}
    for split, pairs in shards.items():
        places: list[tuple[int, int, int]] = []
        names[split], texts[split], cells[split] = [], [], []
        for number, (tar, index) in enumerate(pairs):
            for image, label, sample in _labelled(tar, index.values(), members, group, unused):
                places.append((number, *image[:2]))
                names[split].append(image[2])
                texts[split].append(label)
                if group:
                    cells[split].append(_text(tar, sample[group.label], group) if group.label in sample else "")
        source = Shards([tar for tar, _ in pairs], np.array(places, np.int64).reshape(-1, 3), to_bytes(names[split]))
        splits[split] = source, np.empty(0, np.int64)
    classes, encoded = encode_labels(texts)
    splits = {split: (source, encoded[split]) for split, (source, _) in splits.items()}
    said = f"the key {members.key!r} of the .json members" if members.key else f"the .{members.label} members"
    notes = [] if members.label == "cls" else [f"labels are {said}"]
    paths = {split: [found.removeprefix("./") for found in members] for split, members in names.items()}
    groups: dict[str, Sequence[str]] = {}
    groups |= group_names(options, cells if group else {}, paths)
    return Found(name, splits, classes, files_checksum(files), notes=notes, unused=unused, groups=groups)


def _group_members(samples: Sequence[tuple[Path, Sample]], options: Options) -> Members | None:
    """Return which members hold the groups; None if `--group` is a pattern, or not given."""
    wanted = options.group
    if wanted is None:
        return None
    if not is_image(f".{wanted}") and any(wanted in sample for _, sample in samples):
        return Members(None, wanted)
    tar, member = next(((tar, sample["json"]) for tar, sample in samples if "json" in sample), (None, None))
    found = _json(tar, member) if tar else None
    return Members(None, "json", wanted) if isinstance(found, dict) and wanted in found else None


def _labelled(
    tar: Path, index: Any, members: Members, group: Members | None, unused: Unused
) -> Iterator[tuple[Any, str, Sample]]:
    """Return the image of each sample, its label, and the sample; count the members that are not used."""
    for sample in index:
        image = next((m for end, m in sample.items() if _is_image(end, members)), None)
        label = sample.get(members.label)
        used = {image, label, sample.get(group.label) if group else None} if image and label else set()
        if image and label:
            yield image, _read_label(tar, label, members), sample
        elif image:
            unused.add(NO_LABEL, f"{tar.name}:{image[2]}")
        unused.add(NO_USE, *(f"{tar.name}:{m[2]}" for m in sample.values() if m not in used and m is not image))


def _is_image(extension: str, members: Members) -> bool:
    return extension == members.image if members.image else is_image(f".{extension}")


def _choose(path: Path, samples: Sequence[tuple[Path, Sample]], options: Options) -> Members:
    image = options.path_column and options.path_column.lstrip(".").lower()
    with_image = [(tar, s) for tar, s in samples if any(_is_image(end, Members(image, "")) for end in s)]
    several = next((s for _, s in with_image if sum(is_image(f".{end}") for end in s) > 1), None)
    if several and not image:
        which = ", ".join(f".{end}" for end in several if is_image(f".{end}"))
        raise RequestError(f"{path}: which member is the image? {which}: choose with --path-column EXTENSION")
    ends = Counter(end for _, sample in with_image for end in sample)
    wanted = (options.label_column or "").lstrip(".")
    if wanted and wanted.lower() in ends:
        return Members(image, wanted.lower())
    if wanted:
        return Members(image, "json", wanted)
    if "cls" in ends:
        return Members(image, "cls")
    if "json" in ends:
        return Members(image, "json", _key(path, with_image))
    if "txt" in ends and _are_classes(with_image):
        return Members(image, "txt")
    raise RequestError(
        f"no labelled images in the tar files of {path}: expected NAME.jpg with NAME.cls, .json or .txt "
        f"({_instead(ends)})"
    )


def _instead(ends: Collection[str]) -> str:
    """Return what to do about members of these extensions, none of which holds labels."""
    if "txt" in ends:
        return "its .txt members look like captions; if they are classes: --label-column txt"
    if dotted := next((end for end in ends if end.rpartition(".")[2] in ("cls", "json", "txt")), None):
        return f"a name ends at its first dot, so there is the extension .{dotted}: say --label-column {dotted}"
    others = [end for end in ends if not is_image(f".{end}")]
    return f"found .{', .'.join(others[:5])}" if others else "images in class folders: unpack them first"


def _key(path: Path, samples: Sequence[tuple[Path, Sample]]) -> str | None:
    """Return the key that holds the label in the .json members; None if the whole member is the label."""
    tar, member = next((tar, sample["json"]) for tar, sample in samples if "json" in sample)
    found = _json(tar, member)
    if not isinstance(found, dict):
        return None
    keys = [key for key, value in found.items() if isinstance(value, (str, int)) and not isinstance(value, bool)]
    known = [key for key in KEYS if key in keys]
    if known and (known[0] == "label" or len(set(known)) == 1):
        return known[0]
    if not known and len(keys) == 1:
        return keys[0]
    if not known and (wrong := next((key for key in KEYS if key in found), None)):
        return wrong  # holds a list or the like: `_text` says so
    raise RequestError(
        f"{path}: which key of the .json members is the label? of {', '.join(map(str, found))}: choose with "
        "--label-column KEY"
    )


def _are_classes(samples: Sequence[tuple[Path, Sample]]) -> bool:
    texts = [_read(tar, s["txt"]) for tar, s in samples[:PROBED] if "txt" in s]
    return all(len(text) <= 100 and "\n" not in text for text in texts) and could_be_labels(texts)


def _read_label(tar: Path, member: Any, members: Members) -> str:
    text = _text(tar, member, members)
    if not is_label(text):
        raise RequestError(f"{tar}: {member[2]} holds no label, found {text!r}")
    return text


def _text(tar: Path, member: Any, members: Members) -> str:
    """Return the text that a member, or a key of it, holds; "" if it holds none."""
    if members.label != "json":
        return _read(tar, member)
    found = _json(tar, member)
    value = found.get(members.key) if members.key and isinstance(found, dict) else found
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (list, dict, float, bool)):
        key = members.key or "the label"
        raise RequestError(f"{tar}: {member[2]} holds {value!r:.60} as {key}: an image has exactly one label here")
    return "" if value is None else str(value).strip()


def _json(tar: Path, member: Any) -> Any:
    try:
        return json.loads(_read(tar, member))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{tar}: {member[2]} is not JSON: {error}") from error


def _read(tar: Path, member: Any) -> str:
    offset, size, name, text = member
    if text is not None:
        return str(text)
    if size > LABEL_BYTES:
        raise RequestError(f"{tar}: {name} has {size} bytes, too many for a label")
    return read_range(tar, offset, size).decode("utf-8", "replace").strip()
