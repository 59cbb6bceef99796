"""Decides which folders of an image folder are splits and which are classes, by their names and structure.

A folder is a split if its name says so, filler words aside (`training_set`). It is also a split if only one word
does, and it shares class folders with a split. If two readings are equally likely, an error names the folders.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from convmixer.data.labels import split_of
from convmixer.errors import RequestError

Folder = tuple[str, ...]  # the parts of a path relative to the data's root

GENERIC = ("images", "image", "img", "imgs", "data", "pictures", "photos")  # names of folders that are no classes
NAMELESS = {
    "images",
    "image",
    "img",
    "imgs",
    "data",
    "jpg",
    "jpeg",
    "png",
    "jpegimages",
    "annotations",
    "masks",
    "labels",
}
NO_CLASS = "not in a class folder"
NO_CLASS_FOLDERS = "a split without class folders"
NO_SPLIT = "next to the splits, but not named train, val or test"


@dataclass
class Tree:
    """Folders that hold images, at any depth.

    Args:
        images: Number of images directly in the folder.
        below: Folders in it that hold images, by name.
    """

    images: int = 0
    below: dict[str, "Tree"] = field(default_factory=dict)

    def total(self) -> int:
        """Return the number of images in the folder, at any depth."""
        return self.images + sum(tree.total() for tree in self.below.values())

    def is_wrapper(self) -> bool:
        """Return whether the folder holds nothing but one folder, which holds only folders."""
        only = next(iter(self.below.values()), None)
        return len(self.below) == 1 and not self.images and bool(only and only.below) and not (only and only.images)


@dataclass(frozen=True)
class Layout:
    """Where the class folders are.

    Args:
        splits: "train", "val" or "test" -> the folder that holds the class folders of that split. If `inside`, the
            only key is "".
        inside: The split folders are in the class folders, not around them.
        skipped: Folders that are not used, and why.
        notes: How the folder was read, if that is not obvious.
    """

    splits: dict[str, Folder]
    inside: bool = False
    skipped: dict[Folder, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def place(self, folder: Folder) -> tuple[str, Folder] | str:
        """Return the split of a folder's images and the folder's path in that split, or why they are not used."""
        for skipped, reason in self.skipped.items():
            if folder[: len(skipped)] == skipped:
                return reason
        for split, prefix in self.splits.items():
            rest = folder[len(prefix) :]
            if folder[: len(prefix)] == prefix and rest:
                return (split_of(rest[1])[0], rest) if self.inside else (split, rest)
        return NO_CLASS


def arrange(folders: Mapping[Folder, int]) -> Layout:
    """Return the layout of folders that hold images.

    Args:
        folders: Path of each folder that directly holds images -> number of these images.

    Raises:
        RequestError: There are no class folders, or folders could be splits or classes; the message names them.
    """
    tree = _tree(folders)
    base: Folder = ()
    while tree.is_wrapper() and not split_of(next(iter(tree.below)))[0]:
        name, tree = next(iter(tree.below.items()))
        base += (name,)
    notes = [f"the class folders are in {'/'.join(base)}"] if base else []
    splits, skipped = _split_folders(tree)
    if splits:
        prefixes = {split: (*base, name, *_inner(tree, splits, name)) for split, name in splits.items()}
        skipped |= _without_classes(tree, splits)
        for name in tree.below.keys() - set(splits.values()) - skipped.keys():
            skipped[name] = NO_SPLIT
        named = [f"{split} is {'/'.join(prefix)}" for split, prefix in prefixes.items() if prefix != (split,)]
        notes = [f"splits: {', '.join(named)}"] if named else notes
        kept = {split: prefix for split, prefix in prefixes.items() if splits[split] not in skipped}
        return Layout(kept, False, {(*base, name): reason for name, reason in skipped.items()}, notes)
    if _splits_inside(tree):
        notes.append("splits are folders inside the class folders")
        return Layout({"": base}, True, {}, notes)
    _refuse_equal_folders(tree)
    return Layout({"train": base}, False, {(*base, name): reason for name, reason in skipped.items()}, notes)


def _tree(folders: Mapping[Folder, int]) -> Tree:
    root = Tree()
    for folder, count in folders.items():
        node = root
        for part in folder:
            node = node.below.setdefault(part, Tree())
        node.images += count
    return root


def _split_folders(tree: Tree) -> tuple[dict[str, str], dict[str, str]]:
    """Return split -> folder, and split-named folders that are not used -> reason.

    Raises:
        RequestError: Two folders mean the same split, or a folder could be a split or a class.
    """
    named = {name: split_of(name) for name in tree.below if split_of(name)[0]}
    sure = [name for name, (_, is_sure) in named.items() if is_sure]
    deep = [name for name in sure if tree.below[name].below]
    flat = {name: NO_CLASS_FOLDERS for name in sure if name not in deep}
    if not deep:
        return {}, flat
    classes = {c for name in deep for c in tree.below[name].below}
    deep += [n for n in named if n not in sure and len(classes & tree.below[n].below.keys()) > 1]
    splits: dict[str, str] = {}
    for name in deep:
        split = named[name][0]
        if split in splits:
            raise RequestError(
                f"{splits[split]} and {name} are both the {split} split: put them together, or move one elsewhere"
            )
        splits[split] = name
    _ask_about_one_split(tree, splits)
    return splits, flat


def _ask_about_one_split(tree: Tree, splits: Mapping[str, str]) -> None:
    """Raise RequestError if the only split folder has fewer images than the folders next to it: it may be a class."""
    others = [name for name in tree.below if name not in splits.values()]
    if len(splits) > 1 or len(others) < 2:
        return
    (name,) = splits.values()
    if sum(tree.below[other].total() for other in others) > tree.below[name].total():
        raise RequestError(
            f"{name} may be a split, or a class like {_some(others)}: rename it if it is a class, "
            f"or give the folder {name} as the data if it is the split"
        )


def _inner(tree: Tree, splits: Mapping[str, str], name: str) -> Folder:
    """Return the wrapper folders between a split and its class folders: seg_train in seg_train/seg_train/CLASS."""
    node = tree.below[name]
    path: Folder = ()
    all_wrapped = all(tree.below[other].is_wrapper() for other in splits.values())
    while node.is_wrapper():
        only = next(iter(node.below))
        if not (all_wrapped or only in (name, *GENERIC) or split_of(only)[0] == split_of(name)[0]):
            break
        path, node, all_wrapped = (*path, only), node.below[only], False
    return path


def _without_classes(tree: Tree, splits: Mapping[str, str]) -> dict[str, str]:
    """Return splits whose only folder is generic (val/images) although the train folder has class folders."""
    train = tree.below[splits["train"]].below.keys() if "train" in splits else set()
    found = {}
    for split, name in splits.items():
        below = tree.below[name].below
        generic = len(below) == 1 and below.keys() <= set(GENERIC) and not tree.below[name].is_wrapper()
        if split != "train" and generic and train - below.keys():
            found[name] = NO_CLASS_FOLDERS
    return found


def _splits_inside(tree: Tree) -> bool:
    """Return whether all class folders hold nothing but split folders, and more than one split is there."""
    names = [name for node in tree.below.values() for name in node.below]
    whole = all(node.below and not node.images for node in tree.below.values())
    return whole and all(split_of(name)[1] for name in names) and len({split_of(name)[0] for name in names}) > 1


def _refuse_equal_folders(tree: Tree) -> None:
    """Raise RequestError if all folders contain the same two or more folders: either level could be the classes."""
    nodes = list(tree.below.values())
    if len(nodes) < 2 or not all(node.below and not node.images for node in nodes):
        return
    shared = set.intersection(*(set(node.below) for node in nodes))
    if len(shared) > 1 and all(2 * len(shared) >= len(node.below) for node in nodes):
        raise RequestError(
            f"the folders {_some(tree.below)} all contain the folders {_some(sorted(shared))}: if they are splits, "
            "name them train, val and test; if they are classes, give a table of path and label"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
