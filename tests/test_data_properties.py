"""Data sets of random layout: all of it is used or noted, nothing is in two splits, all commands read the same."""

import os
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convmixer.data.datasets import DataSplits, load_data
from convmixer.errors import RequestError
from convmixer.predict.sources import expand
from data_sets import names, png, write_members

CLASSES = ("cat", "dog", "fox")
SPLITS = ("train", "training_set", "valid", "eval", "test_set", "seg_test")
MANY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

images = st.lists(st.integers(0, 80), min_size=8, max_size=20)
extra = st.tuples(
    st.sampled_from(
        ["hidden", "text", "bad", "loose", "copy", "link", "loop", "hidden folder", "table", "empty", "deep"]
    ),
    st.integers(0, 5),
)
layout = st.fixed_dictionaries(
    {
        "wrapped": st.booleans(),
        "splits": st.sampled_from([(), ("train",), ("training_set", "test_set"), ("train", "eval", "seg_test")]),
        "classes": st.dictionaries(st.sampled_from(CLASSES), images, min_size=2),
        "extras": st.lists(extra, max_size=6),
    }
)


def build(root: Path, plan: dict) -> None:
    """Write a data set."""
    base = root / "inner" if plan["wrapped"] else root
    folders = [base / split / name for split in plan["splits"] or [""] for name in plan["classes"]]
    for folder in folders:
        folder.mkdir(parents=True)
    for number, split in enumerate(plan["splits"] or [""]):
        for c, (name, indices) in enumerate(plan["classes"].items()):
            for n, i in enumerate(indices):  # the classes share no scan, the splits some
                (base / split / name / f"{n:02}.png").write_bytes(png(100 * c + i + 50 * number))
    for n, (kind, where) in enumerate(plan["extras"]):
        add(kind, folders[where % len(folders)], folders, base, n)


def add(kind: str, folder: Path, folders: list[Path], base: Path, n: int) -> None:
    if kind == "hidden":
        (folder / f"._{n}.png").write_bytes(b"\0")
    elif kind == "hidden folder":
        (folder / ".ipynb_checkpoints").mkdir(exist_ok=True)
        (folder / ".ipynb_checkpoints" / f"{n}.png").write_bytes(png(n))
    elif kind == "text":
        (folder / f"{n}.txt").write_text("words")
    elif kind == "bad":
        (folder / f"bad{n}.png").write_text("no image")
    elif kind == "loose":
        (base / f"loose{n}.png").write_bytes(png(n))
    elif kind == "copy":
        (folder / f"copy{n}.png").write_bytes((folder / "00.png").read_bytes())
    elif kind == "table":
        (base / f"table{n}.csv").write_text("path,label\n")
    elif kind == "empty":
        (folder / f"empty{n}").mkdir()
    elif kind == "deep":
        (folder / f"deep{n}" / "more").mkdir(parents=True)
        (folder / f"deep{n}" / "more" / "1.png").write_bytes(png(1500 + n))
    elif kind == "link":
        (folder / f"link{n}").symlink_to(folders[0])
    elif kind == "loop":
        (folder / f"loop{n}").symlink_to(base)


def read(root: Path) -> DataSplits | None:
    """Return the data, or None if they are refused in a line."""
    try:
        return load_data(str(root), val_fraction=0.2, seed=0, max_bad_fraction=0.5)
    except RequestError as error:
        reason = str(error)
    assert "\n" not in reason
    return None


def paths(data: DataSplits) -> list[set[str]]:
    """Return the real paths of the images of each split."""
    found = []
    for part in (data.train, data.val, data.test):
        source = part and getattr(part.source, "source", part.source)
        found.append({os.path.realpath(source.root / name) for name in names(part)} if part else set())
    return found


def noted(root: Path, data: DataSplits) -> set[str]:
    """Return the real paths of what a note names."""
    unused = {os.path.normpath(root / n) for found in data.found.unused.names.values() for n in found}
    for split, (source, _) in data.found.splits.items():
        left_out = [source.name(i) for i, usable in enumerate(data.checked.usable[split]) if not usable]
        unused |= {os.path.realpath(source.root / name) for name in left_out}
    return unused


@MANY
@given(layout)
def test_folders(plan: dict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(os.path.realpath(folder)) / "data"
        build(root, plan)
        data = read(root)
        if data is None:
            return
        used, said = paths(data), noted(root, data)
        everything = {os.path.join(where, file) for where, _, files in os.walk(root) for file in files}
        missing = {p for p in everything - set.union(*used) if not any(p == s or p.startswith(s + "/") for s in said)}
        assert not missing
        assert sum(map(len, used)) == len(set.union(*used))
        contents = [{Path(path).read_bytes() for path in part} for part in used]
        assert sum(map(len, contents)) == len(set.union(*contents))
        again = read(root)
        assert paths(again) == used
        assert (again.checksum, again.notes) == (data.checksum, data.notes)
        predicted = {os.path.realpath(file) for file in expand([root])[0]}
        assert set.union(*used) <= predicted
        assert predicted <= set.union(*used) | said


member = st.tuples(st.sampled_from(["cls", "txt", "json", "none", "seg"]), st.integers(0, 2))


@MANY
@given(st.lists(member, min_size=20, max_size=50), st.booleans())
def test_shards(samples: list[tuple[str, int]], split: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        members = []
        for i, (kind, label) in enumerate(samples):
            members.append((f"{i:03}.png", png(i)))
            if kind == "seg":
                members.append((f"{i:03}.seg", b"x"))
            elif kind != "none":
                members.append((f"{i:03}.{kind}", b'{"label": %d}' % label if kind == "json" else b"%d" % label))
        write_members(root / "train.tar", members)
        if split:
            write_members(root / "test.tar", members)
        data = read(root)
        if data is None:
            return
        total = len(members) * (2 if split else 1)
        images = sum(len(source) for source, _ in data.found.splits.values())
        assert 2 * images + sum(data.found.unused.counts.values()) == total  # each image has one label
        used = [part for part in (data.train, data.val, data.test) if part]
        contents = [{part[i][0].tobytes() for i in range(len(part))} for part in used]
        assert sum(map(len, contents)) == len(set.union(*contents))
        assert [names(part) for part in used] == [names(p) for p in _parts(read(root))]


def _parts(data: DataSplits) -> list:
    return [part for part in (data.train, data.val, data.test) if part]
