"""Tables and parquet of random content: each row, column and file is used or noted, and nothing is in two splits."""

import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from convmixer.data.datasets import DataSplits
from convmixer.data.folder import NO_IMAGE
from convmixer.data.table import A_COLUMN, NOT_NAMED
from convmixer.predict.sources import expand
from data_sets import png
from test_data_properties import noted, paths, read

MANY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
CLASSES = ("cat", "dog")
KINDS = (*["sound"] * 6, "bad", "copy", "copy", "contradiction", "missing")

rows = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 1), st.integers(0, 9)), min_size=20, max_size=50)
tables = st.fixed_dictionaries(
    {
        "rows": rows,
        "folder": st.sampled_from(["", "scans", "deep/scans"]),
        "names": st.sampled_from(["{path}", "{name}", "{stem}", "C:\\pictures\\{name}", "/home/me/{path}"]),
        "delimiter": st.sampled_from([",", ";", "\t"]),
        "encoding": st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
        "split": st.sampled_from([None, "split", "is_test", "fold"]),
        "extra": st.lists(st.sampled_from(["width", "author", "taken at"]), unique=True),
        "others": st.lists(st.sampled_from(["hidden", "text", "not named"]), max_size=4),
    }
)


def write_image(file: Path, kind: str, number: int) -> None:
    """Write the image of a row: a sound one, a damaged one, a copy of another row's, or no file."""
    if kind == "bad":
        file.write_text("no image")
    elif kind != "missing":
        file.write_bytes(png(0 if kind in ("copy", "contradiction") else number + 1))


def cells(plan: dict, number: int) -> list[str]:
    """Return the cells of a row."""
    kind, label, chance = plan["rows"][number]
    path = f"{plan['folder']}/{number:03}.png".lstrip("/")
    image = plan["names"].format(path=path, name=f"{number:03}.png", stem=f"{number:03}")
    split = {"split": "test" if chance < 3 else "train", "is_test": str(chance < 3), "fold": str(chance)}
    label = 0 if kind == "copy" else label
    more = [split[plan["split"]]] if plan["split"] else []
    return [image, CLASSES[label], *more, *(f"{chance}.{column}" for column in plan["extra"])]


def write_table(root: Path, plan: dict) -> Path:
    folder = root / plan["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    for number, (kind, _, _) in enumerate(plan["rows"]):
        write_image(folder / f"{number:03}.png", kind, number)
    for n, kind in enumerate(plan["others"]):
        name = {"hidden": f"._{n}.png", "text": f"{n}.txt", "not named": f"other{n}.png"}[kind]
        (folder / name).write_bytes(png(1000 + n))
    header = ["image", "label", *([plan["split"]] if plan["split"] else []), *plan["extra"]]
    lines = [header, *(cells(plan, n) for n in range(len(plan["rows"])))]
    table = root / "table.csv"
    table.write_bytes("\n".join(plan["delimiter"].join(line) for line in lines).encode(plan["encoding"]))
    return table


def check_columns(data: DataSplits, used: set[str], there: list[str]) -> None:
    """Check that a column that is not used is noted."""
    assert data.found
    assert sorted(data.found.unused.names.get(A_COLUMN, [])) == sorted(set(there) - used)


def check_rows(data: DataSplits, count: int) -> None:
    """Check that each row is in a split, or counted as bad or as a copy of what is in another split."""
    assert data.found
    assert data.checked
    assert sum(len(source) for source, _ in data.found.splits.values()) == count
    parts = [part for part in (data.train, data.val, data.test) if part]
    dropped = sum(int((~usable).sum()) for usable in data.checked.usable.values())
    assert sum(map(len, parts)) + dropped == count
    elsewhere = dropped - len(data.bad_files)
    said = [note for note in data.notes if " images are in two splits: kept in " in note]
    assert elsewhere == (int(said[0].split()[0]) if said else 0)
    if data.bad_files:
        assert any(note.startswith(f"{len(data.bad_files)} of {count} images cannot be used") for note in data.notes)
    pixels = [{part[i][0].tobytes() for i in range(len(part))} for part in parts]
    assert sum(map(len, pixels)) == len(set.union(*pixels))


@MANY
@given(tables)
def test_tables(plan: dict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(os.path.realpath(folder))
        table = write_table(root, plan)
        data = read(table)
        event("read" if data else "refused")
        if data is None:
            return
        check_rows(data, len(plan["rows"]))
        split = {plan["split"]} - {None, "fold"}
        check_columns(
            data, {"image", "label"} | split, ["image", "label", *filter(None, [plan["split"]]), *plan["extra"]]
        )
        used, unused = paths(data), data.found.unused  # type: ignore[union-attr]
        if plan["folder"]:
            base = root / plan["folder"]
            left = {p for p in map(str, base.iterdir()) if p not in set.union(*used) | noted(root, data)}
            assert not left
            assert unused.counts[NOT_NAMED] == plan["others"].count("not named")
            assert unused.counts[NO_IMAGE] == plan["others"].count("text")
        again = read(table)
        assert again
        assert (paths(again), again.checksum, again.notes) == (used, data.checksum, data.notes)
        assert set.union(*used) <= {os.path.realpath(file) for file in expand([root])[0]}


columns = st.fixed_dictionaries(
    {
        "rows": st.lists(
            st.tuples(st.sampled_from(KINDS[:-1]), st.integers(0, 1), st.integers(0, 9)), min_size=20, max_size=50
        ),
        "image": st.sampled_from(["image", "img", "picture"]),
        "form": st.sampled_from(["bytes", "struct", "path"]),
        "labels": st.sampled_from(["number", "text"]),
        "extra": st.lists(st.sampled_from(["width", "caption"]), unique=True),
        "files": st.sampled_from([("train.parquet",), ("train-0.parquet", "test-0.parquet")]),
        "split": st.booleans(),
    }
)


def write_parquet(root: Path, plan: dict) -> list[str]:
    """Write the rows in turn into the files, and return the names of the columns."""
    for number, (kind, _, _) in enumerate(plan["rows"]):
        write_image(root / f"{number:03}.png", kind, number)
    for place, name in enumerate(plan["files"]):
        numbers = range(place, len(plan["rows"]), len(plan["files"]))
        stored = [(root / f"{n:03}.png").read_bytes() for n in numbers]
        if plan["form"] == "struct":
            stored = [{"bytes": data, "path": f"{n:03}.png"} for n, data in zip(numbers, stored, strict=True)]
        if plan["form"] == "path":
            stored = [{"bytes": None, "path": f"{n:03}.png"} for n in numbers]
        labels = [0 if plan["rows"][n][0] == "copy" else plan["rows"][n][1] for n in numbers]
        found = {
            plan["image"]: pa.array(stored, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
            if plan["form"] != "bytes"
            else pa.array(stored, pa.binary()),
            "label": labels if plan["labels"] == "number" else [CLASSES[label] for label in labels],
            **{column: [n / 2 for n in numbers] for column in plan["extra"]},
        }
        if plan["split"]:
            found["split"] = ["test" if plan["rows"][n][2] < 3 else "train" for n in numbers]
        pq.write_table(pa.table(found), root / name)
    return list(found)


@MANY
@given(columns)
def test_parquet(plan: dict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(os.path.realpath(folder))
        there = write_parquet(root, plan)
        data = read(root)
        event("read" if data else "refused")
        if data is None:
            return
        check_rows(data, len(plan["rows"]))
        check_columns(data, {plan["image"], "label", "split"}, there)
        assert data.found
        others = {p.name for p in root.glob("*.png")} - {
            name for reason, names in data.found.unused.names.items() if reason != A_COLUMN for name in names
        }
        assert not others or plan["form"] == "path"
        again = read(root)
        assert again
        assert (again.checksum, again.notes) == (data.checksum, data.notes)
        for one, other in ((data.train, again.train), (data.val, again.val), (data.test, again.test)):
            assert (one is None) == (other is None)
            assert one is None or other is None or one.indices.tolist() == other.indices.tolist()
