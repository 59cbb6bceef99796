"""Parquet files and WebDataset shards, with real images."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from convmixer.data import parquet
from convmixer.data.options import Options
from convmixer.errors import RequestError
from data_sets import DIGITS, label, load, parts, pixels, png, write_members, write_parquet, write_tar


@pytest.mark.parametrize("folder", ["", "data"])
@pytest.mark.parametrize("features", [True, False])
def test_parquet(tmp_path: Path, folder: str, features: bool) -> None:
    root = tmp_path / folder
    write_parquet(root / "train-00000-of-00002.parquet", range(40), features=features)
    write_parquet(root / "train-00001-of-00002.parquet", range(40, 70), features=features)
    write_parquet(root / "validation-00000-of-00001.parquet", range(70, 90), features=features)
    write_parquet(root / "test-00000-of-00001.parquet", range(90, 120), features=features)
    data = load(tmp_path)
    train, val, test = parts(data)
    assert (len(train), len(val), len(test)) == (70, 20, 30)
    assert data.classes == tuple(f"digit {i}" if features else str(i) for i in range(10))
    assert test.labels.tolist() == DIGITS.target[90:120].tolist()
    assert np.array_equal(np.asarray(train[41][0]), (DIGITS.images[41] * 15).astype(np.uint8))


def test_large_parquet_is_mapped_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "data" / "train.parquet", range(50))
    in_memory = load(tmp_path / "data")
    monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):  # the second time from the copy
        before = pa.total_allocated_bytes()
        mapped = load(tmp_path / "data")
        assert pa.total_allocated_bytes() - before < 4096
        assert pixels(parts(mapped)[0]) == pixels(parts(in_memory)[0])
        assert mapped.checksum == in_memory.checksum
    assert len(list((tmp_path / "cache" / "convmixer").iterdir())) == 1


def test_wrong_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a" / "train.parquet", range(20))
    write_parquet(tmp_path / "b" / "train.parquet", range(20))
    with pytest.raises(RequestError, match="several data sets: give one of the folders a, b"):
        load(tmp_path)
    (tmp_path / "a" / "train.parquet").write_bytes(b"PAR1 nothing here PAR1")
    with pytest.raises(RequestError, match="not a readable parquet file"):
        load(tmp_path / "a")
    table = pa.table({"x": pa.array([b"1"]), "y": pa.array([b"2"]), "label": pa.array([1])})
    pq.write_table(table, tmp_path / "b" / "train.parquet")
    with pytest.raises(RequestError, match=r"which column is the image\?.*several could be \(x, y\)"):
        load(tmp_path / "b")


def test_parquet_without_labels_in_test(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", range(60), features=False)
    table = pq.read_table(tmp_path / "train.parquet").slice(0, 10)
    table = table.set_column(2, "target", pa.array([-1] * 10))
    pq.write_table(table, tmp_path / "test.parquet")
    data = load(tmp_path)
    assert [len(part) for part in parts(data)] == [38, 10, 12]
    assert "split test has no labels: not used" in data.notes


def test_parquet_labels_come_from_the_column_called_so(tmp_path: Path) -> None:
    words = pa.array([label(i) for i in range(60)])
    sides = pa.array([(320, 640)[i % 2] for i in range(60)])
    images = pa.array([png(i) for i in range(60)])
    pq.write_table(pa.table({"width": sides, "image": images, "label": words}), tmp_path / "a.parquet")
    data = load(tmp_path / "a.parquet")
    assert data.classes == tuple(f"digit {i}" for i in range(10))
    assert "labels are those of column 'label'" in data.notes
    pq.write_table(pa.table({"image": images, "number": sides, "text": words}), tmp_path / "b.parquet")
    with pytest.raises(RequestError, match=r"which column is the label\? .*several could be \(number, text\)"):
        load(tmp_path / "b.parquet")
    assert load(tmp_path / "b.parquet", options=Options(label_column="number")).classes == ("320", "640")
    pq.write_table(pa.table({"image": images, "breed": words}), tmp_path / "c.parquet")
    data = load(tmp_path / "c.parquet")
    assert "labels are those of column 'breed'" in data.notes
    assert not [note for note in data.notes if note.startswith("not used")]


def test_webdataset(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"digits-train-{number:06}.tar", range(30 * number, 30 * number + 30))
    write_tar(tmp_path / "digits-val-000000.tar", range(90, 110))
    data = load(tmp_path, 0.1)
    train, val, test = parts(data)
    assert (len(train), len(val), len(test)) == (72, 20, 18)
    assert data.classes == tuple(f"digit {i}" for i in range(10))
    assert np.array_equal(np.asarray(val[3][0]), (DIGITS.images[93] * 15).astype(np.uint8))
    write_tar(tmp_path / "one.tar", range(60), lambda i: str(DIGITS.target[i]))
    assert load(tmp_path / "one.tar").classes == tuple("0123456789")


def test_wrong_tar(tmp_path: Path) -> None:
    file = tmp_path / "train.tar"
    write_tar(file, range(40))
    with file.open("r+b") as opened:
        opened.truncate(30_500)
    with pytest.raises(RequestError, match=r"cut short|not a readable"):
        load(file)
    with tarfile.open(file, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.cls"))
    with pytest.raises(RequestError, match="not a readable, uncompressed tar"):
        load(file)
    with tarfile.open(file, "w") as tar:
        tar.addfile(tarfile.TarInfo("readme.txt"))
    with pytest.raises(RequestError, match=r"NAME\.cls"):
        load(file)


def write_table(path: Path, metadata: object = None, **columns: pa.Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path)
    return path


def values(**types: str) -> dict[str, object]:
    return {"info": {"features": {name: {"dtype": kind, "_type": "Value"} for name, kind in types.items()}}}


SCANS = pa.array([png(i) for i in range(60)])
NUMBERS = pa.array([int(DIGITS.target[i]) for i in range(60)])
STRUCTS = pa.array([{"bytes": png(i), "path": None} for i in range(60)])


@pytest.mark.parametrize("metadata", [None, "text", [1], {"info": None}, {"info": {"features": [1]}}, {"info": []}])
def test_descriptions_of_columns_of_any_form(tmp_path: Path, metadata: object) -> None:
    data = load(write_table(tmp_path / "a.parquet", metadata, image=SCANS, label=NUMBERS))
    assert data.classes == tuple("0123456789")


def test_value_features_are_read(tmp_path: Path) -> None:
    described = values(image="binary", label="int64")
    assert len(load(write_table(tmp_path / "a.parquet", described, image=SCANS, label=NUMBERS)).classes) == 10
    struct = {"bytes": {"dtype": "binary", "_type": "Value"}, "path": {"dtype": "string", "_type": "Value"}}
    described["info"]["features"]["image"] = struct
    assert len(load(write_table(tmp_path / "b.parquet", described, image=STRUCTS, label=NUMBERS)).classes) == 10


def test_paths_in_place_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(60):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / f"{i}.png").write_bytes(png(i))
    described = {"info": {"features": {"image": {"_type": "Image"}}}}
    whole = pa.array([{"bytes": None, "path": str(tmp_path / "files" / f"{i}.png")} for i in range(60)])
    short = pa.array([{"bytes": None, "path": f"{i}.png"} for i in range(60)])
    for column in (whole, short, pc.struct_field(short, "path")):
        data = load(write_table(tmp_path / "train.parquet", described, image=column, label=NUMBERS))
        assert sum(map(len, parts(data))) == 60
        assert any("the images are read from the paths in the column" in note for note in data.notes)
    lost = pa.array([{"bytes": None, "path": f"gone/{i}x.png"} for i in range(60)])
    with pytest.raises(RequestError, match=r"not in the parquet files, only their paths, .*--image-root"):
        load(write_table(tmp_path / "train.parquet", described, image=lost, label=NUMBERS))
    write_table(tmp_path / "hub" / "train.parquet", described, image=whole, label=NUMBERS)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "hub"))
    with pytest.raises(RequestError, match="paths in untrusted files are not opened"):
        load("hf-hub:owner/name")


def test_what_is_no_single_label_is_refused(tmp_path: Path) -> None:
    def refused(reason: str, label: pa.Array, names: list[str] | None = None) -> None:
        described = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}} if names else None
        with pytest.raises(RequestError, match=reason):
            load(write_table(tmp_path / "a.parquet", described, image=SCANS, label=label))

    refused("an image has exactly one label", pa.array([[0, 1]] * 60))
    refused("NaN", pa.array([0.0, float("nan")] * 30))
    refused("holds 0.5, but labels are texts or whole numbers", pa.array([0.5, 1.0] * 30))
    refused("holds 'nan', which is not a label", pa.array(["a", "nan"] * 30))
    refused("have no label in column 'label'", pa.array([0, None] * 30))
    refused(r"two class names 'cat' and 'cat' are equal", pa.array([0, 1] * 30), ["cat", "cat"])
    refused("differ only in Unicode normalisation", pa.array([0, 1] * 30), ["caf\u00e9", "cafe\u0301"])
    refused("only 2 class names", pa.array([0, 2] * 30), ["a", "b"])


def test_a_column_that_says_the_split(tmp_path: Path) -> None:
    split = pa.array(["test" if i >= 40 else "train" for i in range(60)])
    fold = pa.array([i % 5 for i in range(60)])
    file = write_table(tmp_path / "all.parquet", image=SCANS, label=NUMBERS, split=split, fold=fold)
    data = load(file, 0)
    assert [len(part) for part in (data.train, data.test) if part] == [40, 20]
    assert "not used, a column of the table: 1 (fold)" in data.notes
    data = load(file, 0, options=Options(split_column="fold=0"))
    assert [len(part) for part in (data.train, data.test) if part] == [48, 12]
    with pytest.raises(RequestError, match=r"--split-column folds: .* has the columns image, label, split, fold"):
        load(file, options=Options(split_column="folds=0"))


def members(i: int, **files: object) -> list[tuple[str, bytes]]:
    return [(f"{i:04}.png", png(i)), *((f"{i:04}.{end}", str(text).encode()) for end, text in files.items())]


def shard(path: Path, sample: Callable[[int], list[tuple[str, bytes]]]) -> Path:
    write_members(path, (member for i in range(60) for member in sample(i)))
    return path


def test_labels_of_shards_in_any_member(tmp_path: Path) -> None:
    tar = tmp_path / "train.tar"
    for sample in (
        lambda i: members(i, txt=label(i)),
        lambda i: members(i, json=json.dumps({"label": label(i), "width": 8, "url": f"x{i}"})),
        lambda i: members(i, json=json.dumps({"cls": label(i), "hash": f"x{i}"})),
        lambda i: members(i, json=json.dumps(label(i))),
        lambda i: members(i, cls=label(i), json="{}", txt=f"a scan of {label(i)}, number {i}"),
    ):
        data = load(shard(tar, sample))
        assert data.classes == tuple(f"digit {i}" for i in range(10))
    assert (
        "not used, a member that is neither an image nor a label: 120 (train.tar:0000.json, train.tar:0000.txt"
        in " ".join(data.notes)
    )
    shard(tar, lambda i: members(i, json=json.dumps({"kind": label(i), "size": 8})))
    with pytest.raises(
        RequestError, match=r"which key of the \.json members is the label\? of kind, size: choose with"
    ):
        load(tar)
    assert len(load(tar, options=Options(label_column="kind")).classes) == 10


def test_members_that_could_be_two_things_are_asked_about(tmp_path: Path) -> None:
    tar = tmp_path / "train.tar"
    shard(tar, lambda i: [*members(i, cls=label(i)), (f"{i:04}.jpg", png(59 - i))])
    with pytest.raises(
        RequestError, match=r"which member is the image\? \.png, \.jpg: choose with --path-column EXT"
    ):
        load(tar)
    data = load(tar, options=Options(path_column="png"))
    assert sum(map(len, parts(data))) == 60
    assert any("neither an image nor a label: 60 (train.tar:0000.jpg" in note for note in data.notes)
    shard(tar, lambda i: members(i, txt=f"a scan of {label(i)}, number {i}"))
    with pytest.raises(RequestError, match="look like captions; if they are classes: --label-column txt"):
        load(tar)
    shard(tar, lambda i: members(i, json=json.dumps({"label": [1, 2]})))
    with pytest.raises(RequestError, match=r"which key|exactly one label"):
        load(tar)
    shard(tar, lambda i: members(i, cls="" if i == 7 else label(i)))
    with pytest.raises(RequestError, match=r"0007\.cls holds no label"):
        load(tar)
    shard(tar, lambda i: members(i % 59, cls=label(i % 59)))
    with pytest.raises(RequestError, match=r"two members 0000.png"):
        load(tar)
    shard(tar, lambda i: members(i, cls=label(i)) if i else members(i))
    assert "not used, an image without label: 1 (train.tar:0000.png)" in load(tar).notes
