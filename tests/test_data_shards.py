"""Parquet files and WebDataset shards, with real images."""

import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convmixer.data import parquet
from convmixer.errors import RequestError
from data_sets import DIGITS, label, load, parts, pixels, png, write_parquet, write_tar


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
    data = load(tmp_path / "b.parquet")  # no such name: the one column of integers
    assert data.classes == ("320", "640")
    assert "labels are those of column 'number'" in data.notes


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
