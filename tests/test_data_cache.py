"""What was read of a data set is not read again: a second start asks for size and time of each file, and no more."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convmixer.data import scan as scanning
from convmixer.data import sources, status, tar_index
from data_sets import DIGITS, label, load, names, parts, png, write_folder, write_parquet, write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, used for small data sets too, and for files written just now."""
    monkeypatch.setattr(scanning, "CACHED_FROM", 10)
    monkeypatch.setattr(tar_index, "CACHED_FROM", 10)
    monkeypatch.setattr(status, "SETTLED", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "convmixer"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that were read, for their header or as a whole."""
    seen: list[str] = []
    for kind in (sources.Files, sources.Shards, sources.Column):

        def header(self: sources.Encoded, index: int) -> tuple[str, tuple[int, int]]:
            seen.append(self.name(index))
            return sources.Encoded.header(self, index)

        def digest(self: sources.Encoded, index: int, whole: bool = False) -> int:
            seen.extend([f"{self.name(index)} whole"] * whole)
            return sources.Encoded.digest(self, index, whole)

        monkeypatch.setattr(kind, "header", header)
        monkeypatch.setattr(kind, "digest", digest)
    return seen


@dataclass(frozen=True)
class Listed(sources.OnDisk):
    """A source of somebody else's: files in a list."""

    files: list[Path]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index].name

    def encoded(self, index: int) -> Path:
        return self.files[index]

    def sizes_and_times(self) -> np.ndarray:
        return status.file_status(Path(), [str(file) for file in self.files])

    def identity(self) -> bytes:
        return repr(self.files).encode()


def test_any_source_on_this_disk_is_cached_and_its_long_files_are_told_apart(tmp_path: Path, cache: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)
    files = [tmp_path / f"{i}.bmp" for i in range(12)]
    for i, file in enumerate(files):
        noise[0] = max(1, i)  # BMP stores the first row last: the first 8 KiB of all files are equal
        Image.fromarray(noise).save(file)
    source = Listed(files)
    for expected in (False, True):
        found = scanning.scan(source)
        assert found.kept is not None
        assert found.kept.valid.all() == expected
        (numbers,) = scanning.copies([source], [found])
        assert numbers.tolist() == [0, 0, *range(2, 12)]
    assert len(list((cache / "headers").iterdir())) == 1


def test_headers_are_read_once_and_again_if_a_file_changes(tmp_path: Path, cache: Path, read: list[str]) -> None:
    root = write_folder(tmp_path / "data", range(60))
    first = load(root)
    assert len(read) == 60
    second = load(root)
    assert len(read) == 60
    assert [names(p) for p in parts(second)] == [names(p) for p in parts(first)]
    changed = root / label(7) / "0007.png"
    changed.write_bytes(png(100))
    os.utime(changed, ns=(1, 1))
    load(root)
    assert read[60:] == [f"{label(7)}/0007.png"]
    changed.write_bytes(b"no image")
    for _ in range(2):  # what cannot be read is tried anew each time
        assert len(load(root, bad=0.1).bad_files) == 1
    assert read[61:] == [f"{label(7)}/0007.png"] * 2
    for file in (cache / "headers").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert [names(p) for p in parts(load(root, bad=0.1))] == [names(p) for p in parts(load(root, bad=0.1))]
    assert len(DIGITS.images) > 60


def test_a_file_of_the_same_size_and_old_time_put_in_the_place_of_another_is_noticed(
    tmp_path: Path, read: list[str]
) -> None:
    root = write_folder(tmp_path / "data", range(60))
    load(root)
    file = root / label(7) / "0007.png"
    before, pixels = file.stat(), bytearray(file.read_bytes())
    pixels[-20] ^= 1  # in the middle of its compressed pixels
    other = tmp_path / "other.png"
    other.write_bytes(pixels)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, file)
    del read[:]
    load(root)
    assert read == [f"{label(7)}/0007.png"]


def test_files_changed_just_now_are_not_kept(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more change within the step of the clock would not show."""
    monkeypatch.setattr(status, "SETTLED", 10**12)
    root = write_folder(tmp_path / "data", range(60))
    load(root)
    load(root)
    assert len(read) == 120


def test_a_second_start_asks_once_for_each_file(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder(tmp_path / "data", range(60))
    load(root)
    asked: list[str] = []
    real = os.stat

    def count(path: object, **others: object) -> os.stat_result:
        asked.append(str(path))
        return real(path, **others)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(os, "stat", count)
    load(root)
    images = [path for path in asked if path.endswith(".png")]
    assert len(images) == len(set(images)) == 60


def test_long_files_that_begin_alike_are_read_whole_once(tmp_path: Path, read: list[str]) -> None:
    root = write_folder(tmp_path / "data", range(60))
    start = png(3) + bytes(9000)
    for number in range(4):  # what follows the end of a PNG is not part of it
        (root / label(3) / f"long{number}.png").write_bytes(start + bytes([number % 3]) * 9)
    first = load(root)
    assert sum(name.endswith("whole") for name in read) == 4
    second = load(root)
    assert sum(name.endswith("whole") for name in read) == 4
    assert first.checked is not None
    assert second.checked is not None
    assert first.checked.copies == second.checked.copies == 1


def test_shards_are_read_once_and_again_if_one_changes(
    tmp_path: Path, cache: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed: list[Path] = []
    real = tar_index._read
    monkeypatch.setattr(tar_index, "_read", lambda path: indexed.append(path) or real(path))
    root = tmp_path / "data"
    root.mkdir()
    tars = [root / "a.tar", root / "b.tar"]
    write_tar(tars[0], range(30))
    write_tar(tars[1], range(30, 60))
    first = load(root)
    assert (len(indexed), len(read)) == (2, 60)
    second = load(root)
    assert (len(indexed), len(read)) == (2, 60)
    for one, other in zip(parts(first), parts(second), strict=True):
        assert names(one) == names(other)
        assert np.array_equal(one.labels, other.labels)
    write_tar(tars[1], range(60, 90))
    load(root)
    assert indexed[2:] == [tars[1]]
    assert len(read) == 60 + 30 or len(read) == 120  # places in both may have moved
    for file in [*(cache / "tars").iterdir(), *(cache / "headers").iterdir()]:
        file.write_bytes(file.read_bytes()[:100])
    assert [names(p) for p in parts(load(root))] == [names(p) for p in parts(load(root))]


def test_rows_of_parquet_are_read_once_and_again_if_a_file_changes(tmp_path: Path, read: list[str]) -> None:
    root = tmp_path / "data"
    files = [root / "train-0.parquet", root / "test-0.parquet"]
    write_parquet(files[0], range(60))
    write_parquet(files[1], range(60, 90))
    first = load(root)
    assert len(read) == 90
    second = load(root)
    assert len(read) == 90
    for one, other in zip(parts(first), parts(second), strict=True):
        assert names(one) == names(other)
    write_parquet(files[1], range(100, 130))
    load(root)
    assert len(read) == 180
