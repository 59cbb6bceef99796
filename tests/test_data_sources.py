"""Every kind of data argument, with real images: what is found, how it is split, and what bad files lead to."""

import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from convmixer.config import Config
from convmixer.data import datasets
from convmixer.data import find as finder
from convmixer.data.datasets import ImageSet, load_data, stratified
from convmixer.data.loader import eval_loader, train_loader
from convmixer.data.sources import Cached
from convmixer.data.transforms import eval_transform, preprocessing_of, train_transform
from convmixer.errors import RequestError
from convmixer.preprocess import Preprocessing
from data_sets import DIGITS, PHOTO, label, load, names, parts, pixels, png, write_folder, write_parquet, write_tar

# splits


def test_digits() -> None:
    data = load("digits", val_fraction=0.1)
    train, val, test = parts(data)
    assert (len(train), len(val), len(test)) == (1293, 144, 360)
    assert (data.img_size, data.in_chans, data.classes) == (8, 1, tuple("0123456789"))
    image, number = test[5]
    where = int(test.name(5)[7:-1])
    assert number == DIGITS.target[where]
    assert np.abs(np.asarray(image) / 255 - DIGITS.images[where] / 16).max() < 0.01


def test_statistics_of_grey_images_hold_one_image_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "scan").mkdir()
    for i in range(30):
        PHOTO.convert("L").rotate(i).resize((500, 500)).save(tmp_path / "scan" / f"{i}.png")
    tracemalloc.start()
    data = load(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    train = parts(data)[0]
    stacked = np.stack([np.asarray(train[i][0]) for i in range(len(train))]) / 255
    assert data.mean == (round(float(stacked.mean()), 4),)
    assert data.std == (round(float(stacked.std()), 4),)
    assert peak < stacked.nbytes / 4


def test_splits_share_no_image_and_test_stays_the_same() -> None:
    first, again, other = load("digits"), load("digits"), load("digits", 0.3, seed=1)
    for data in (first, other):
        train, val, test = (names(part) for part in parts(data))
        assert not train & val | train & test | val & test
        assert len(train | val | test) == 1797
    assert names(parts(first)[1]) == names(parts(again)[1]) != names(parts(other)[1])
    assert names(parts(first)[2]) == names(parts(other)[2])
    assert load("digits", 0).val is None


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.25, 0.5])
def test_splits_are_stratified(fraction: float) -> None:
    labels = np.repeat([0, 1, 2, 3], [1, 7, 100, 892])
    held = stratified(labels, fraction, 0)
    assert held.sum() == int(np.ceil(fraction * 1000))
    for number, count in enumerate(np.bincount(labels)):
        kept = (labels[~held] == number).sum()
        assert kept >= 1
        assert abs(kept - count * (1 - fraction)) <= 1.5
    assert (stratified(labels, fraction, 0) == held).all()
    assert (stratified(labels, fraction, 1) != held).any()


# kinds of source


def test_folder_without_splits(tmp_path: Path) -> None:
    data = load(write_folder(tmp_path, range(200)))
    train, val, test = parts(data)
    assert (len(train), len(val), len(test)) == (128, 32, 40)
    assert data.classes == tuple(f"digit {i}" for i in range(10))
    assert "train 128, val 32, test 40 images" in data.notes
    assert pixels(train)[0] != pixels(val)[0]
    assert (data.img_size, data.in_chans, len(data.mean)) == (8, 1, 1)
    assert all(train.name(i).startswith(data.classes[train.labels[i]]) for i in range(len(train)))


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_folder_with_splits(tmp_path: Path, name: str) -> None:
    for split, indices in (("train", range(60)), (name, range(60, 90)), ("test", range(90, 120))):
        write_folder(tmp_path / split, indices)
    (tmp_path / "train" / "notes.txt").write_text("hello")
    data = load(tmp_path)
    assert [len(part) for part in parts(data)] == [60, 30, 30]
    assert any("notes.txt" in note for note in data.notes)


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    for split, indices in (("train", range(60)), ("val", range(60, 90)), ("Validation", range(90, 120))):
        write_folder(tmp_path / split, indices)
    with pytest.raises(RequestError, match=r"Validation and .*val are both the val split: put them together"):
        load(tmp_path)
    (tmp_path / "Validation").rename(tmp_path / "more")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "loose.png").write_bytes(png(0))
    data = load(tmp_path)  # no class folders in one of them: not used, and the run says so
    assert len(parts(data)[1]) == 30
    assert any(note.endswith("dev holds no class folders: not used") for note in data.notes)


def test_val_serves_as_test_where_nothing_is_selected(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", range(60))
    write_folder(tmp_path / "val", range(60, 90))
    data = load(tmp_path, 0)
    assert (data.val, len(data.test or [])) == (None, 30)
    assert [len(part) for part in parts(load(tmp_path))] == [48, 30, 12]


def test_what_is_odd_is_said(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", range(60))
    (tmp_path / "train" / "nothing").mkdir()
    (tmp_path / "val" / "empty").mkdir(parents=True)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "loose.png").write_bytes(png(0))
    notes = " | ".join(load(tmp_path).notes)
    for part in ("test holds no class folders", "nothing has no images", "split val is empty", "no val split"):
        assert part in notes
    write_folder(tmp_path / "one" / "images", range(0, 60, 10)[:1])
    PHOTO.save(tmp_path / "one" / "images" / "photo.png")
    PHOTO.save(tmp_path / "one" / "images" / "photo.jpg")
    data = load(tmp_path / "one", 0)
    assert (data.img_size, data.in_chans, data.mean) == (224, 3, (0.485, 0.456, 0.406))
    assert "only one class, 'images'" in " ".join(data.notes)
    assert "images differ in size: used at 224" in " ".join(data.notes)


def test_loose_test_images_beside_class_folders_are_no_class(tmp_path: Path) -> None:
    write_folder(tmp_path, range(90))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "unknown.png").write_bytes(png(0))
    data = load(tmp_path)
    assert data.classes == tuple(f"digit {i}" for i in range(10))
    assert any(note.endswith("test holds no class folders: not used") for note in data.notes)
    assert not any("has no images" in note for note in data.notes)


@pytest.mark.parametrize("split", [False, True])
def test_a_stray_archive_beside_class_folders_is_ignored(tmp_path: Path, split: bool) -> None:
    for name, indices in (("train", range(60)), ("test", range(60, 90))):
        write_folder(tmp_path / name if split else tmp_path, indices)
    expected = load(tmp_path)
    (tmp_path / "backup.tar").write_bytes(b"anything")
    write_parquet(tmp_path / "more.parquet", range(90, 120))
    data = load(tmp_path)
    assert (data.classes, data.checksum) == (expected.classes, expected.checksum)
    assert [pixels(part) for part in parts(data)] == [pixels(part) for part in parts(expected)]
    for stray in ("backup.tar", "more.parquet"):
        assert any(stray in note and "ignored" in note for note in data.notes)


def test_pictures_beside_parquet_are_no_class_folder(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", range(60))
    (tmp_path / "assets").mkdir()
    PHOTO.save(tmp_path / "assets" / "readme.png")
    assert load(tmp_path).classes == tuple(f"digit {i}" for i in range(10))


def test_odd_names_and_links_that_lead_back(tmp_path: Path) -> None:
    write_folder(tmp_path, range(60))
    (tmp_path / label(0) / "all").symlink_to(tmp_path)
    (tmp_path / label(1) / "self").symlink_to(".")
    (tmp_path / label(2) / os.fsdecode(b"fl\xe9ur.png")).write_bytes(png(2))  # not UTF-8
    assert sum(len(part) for part in parts(load(tmp_path))) == 61


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, range(60))
    (tmp_path / label(0)).chmod(0)
    with pytest.raises(RequestError, match=f"cannot read .*{label(0)}: Permission denied"):
        load(tmp_path)


def test_only_a_test_split_can_be_evaluated(tmp_path: Path) -> None:
    write_folder(tmp_path / "test", range(30))
    data = load(tmp_path)
    assert (data.train, data.val, len(data.test or [])) == (None, None, 30)


def test_csv(tmp_path: Path) -> None:
    write_folder(tmp_path / "scans", range(60))
    rows = [f"scans/{label(i)}/{i:04}.png,{label(i)}" for i in range(60)]
    (tmp_path / "plain.csv").write_text("\n".join(rows))
    (tmp_path / "named.csv").write_text(
        "label,split,file\n"
        + "\n".join(
            f"{r.split(',')[1]},{'test' if n < 20 else 'Train'},{r.split(',')[0]}" for n, r in enumerate(rows)
        )
    )
    plain, named = load(tmp_path / "plain.csv"), load(tmp_path / "named.csv")
    assert sum(len(part) for part in parts(plain)) == 60
    assert [len(part) for part in parts(named)] == [32, 8, 20]
    assert plain.classes == named.classes == tuple(f"digit {i}" for i in range(10))


def test_classes_of_one_number_keep_their_order() -> None:
    spellings = ["0" * zeros + number for zeros in range(9) for number in ("1", "2")]
    classes, labels = finder.encode_labels({"train": spellings})
    assert list(classes) == sorted(spellings, key=lambda name: (int(name), name))
    assert [classes[i] for i in labels["train"]] == spellings


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no images"),
        ("a.png\n", "line 1: expected path,label"),
        ("path,label\na.png,\n", "line 2: expected path,label"),
        ("path,label,split\na.png,x,hidden\n", "split 'hidden' is not"),
        ("where,what\nreal.png,x\n", "line 1 is no image, and as a header"),
        ("path,label,split\nreal.png,x,train\nreal.png,y,test\n", "class 'y' is in test but"),
    ],
)
def test_wrong_csv(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "real.png").write_bytes(png(0))
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(RequestError, match=reason):
        load(tmp_path / "table.csv")


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
    monkeypatch.setattr(finder, "IN_MEMORY_BYTES", 0)
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


def test_wrong_settings() -> None:
    data = load("digits")
    for values, reason in (
        ({"mean": (0.1, 0.2, 0.3)}, "must each have 1 values"),
        ({"crop_pct": 0.0}, "crop_pct must be"),
        ({"scale": (1.0, 0.5)}, "scale must be two numbers"),
        ({"ratio": (0.0, 1.0)}, "ratio must be two numbers"),
    ):
        with pytest.raises(RequestError, match=reason):
            train_transform(Config(**values), preprocessing_of(data, Config(**values)))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="seed must be 0 to"):
        load("digits", seed=-1)
    with pytest.raises(RequestError, match="workers must be"):
        eval_loader(parts(data)[0], eval_transform(preprocessing_of(data, Config())), 8, -1)


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="no data 'digitz': give digits, cifar10"):
        load("digitz")
    with pytest.raises(RequestError, match="no images in"):
        load(tmp_path)
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(RequestError, match="not a data set"):
        load(tmp_path / "readme.md")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("CONVMIXER_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        RequestError, match=r"'cifar100' are not here and cannot be downloaded.*Put the parquet files in"
    ):
        load("cifar100")
    with pytest.raises(RequestError, match="cannot be downloaded from the hub"):
        load("nobody/nothing")
    (tmp_path / "nobody").mkdir()
    for spec in ("nobody/nothing", "nobody/nothing/more"):  # a path with a slip in it
        with pytest.raises(RequestError, match=f"no data '{spec}': the folder nobody is here, but"):
            load(spec)


def cifar_folder() -> Path:
    for root in (os.environ.get("CONVMIXER_DATA"), Path(__file__).parents[2] / "shared" / "data"):
        if root and (folder := Path(root) / "cifar10").is_dir():
            return folder
    pytest.skip("real CIFAR-10 parquet not found: set CONVMIXER_DATA to the folder that holds cifar10/")


def test_real_cifar10() -> None:
    data = load(cifar_folder(), 0.1)
    train, val, test = parts(data)
    assert (len(train), len(val), len(test)) == (45_000, 5_000, 10_000)
    assert (data.name, data.img_size, data.in_chans, data.classes[3]) == ("cifar10", 32, 3, "cat")
    assert np.bincount(val.labels).tolist() == [500] * 10
    assert data.checksum.startswith("sha256:")
    chosen = [np.asarray(train[i][0], np.float64) / 255 for i in range(0, 45_000, 30)]
    assert np.allclose(np.mean(chosen, (0, 1, 2)), data.mean, atol=0.01)
    assert np.allclose(np.std(chosen, (0, 1, 2)), data.std, atol=0.01)
    assert train[1][0].tobytes() == train[1][0].tobytes()  # decoded, then from the cache


@pytest.mark.parametrize("kind", ["digits", "folder", "parquet", "tar"])
def test_workers_read_what_the_main_process_reads(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        write_folder(tmp_path, range(90))
    if kind == "parquet":
        write_parquet(tmp_path / "train.parquet", range(90))
    if kind == "tar":
        write_tar(tmp_path / "train.tar", range(90))
    spec = "digits" if kind == "digits" else tmp_path
    images = parts(load(spec))[0].subset(np.arange(48))
    transform = train_transform(Config(hflip=0.5, color_jitter=0.5), Preprocessing(8, 1, (0.5,), (0.5,)))
    runs = []
    for source, workers in ((images, 0), (images, 2), (pickle.loads(pickle.dumps(images)), 0)):
        iterator = iter(train_loader(source, transform, batch_size=16, seed=0, workers=workers))
        runs.append([next(iterator) for _ in range(9)])  # three epochs: the later ones come from the cache
    for other in runs[1:]:
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(runs[0], other, strict=True))
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(runs[0], other, strict=True))


@pytest.mark.parametrize(
    ("room", "kept"), [(120, ["train", "val", "test"]), (100, ["train", "test"]), (59, ["test"])]
)
def test_the_splits_share_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, kept: list[str]
) -> None:
    monkeypatch.setattr(datasets, "CACHE_BYTES", room * 64)
    for split, indices in (("train", range(60)), ("val", range(60, 90)), ("test", range(90, 120))):
        write_folder(tmp_path / split, indices)
    sets = zip(("train", "val", "test"), parts(load(tmp_path)), strict=True)
    assert [split for split, images in sets if isinstance(images.source, Cached)] == kept


# bad files


def damage(root: Path) -> list[Path]:
    """Turn four images into an empty file, a text, a broken link and a bomb; return them."""
    files = sorted(root.rglob("*.png"))[:4]
    files[0].write_bytes(b"")
    files[1].write_text("not an image")
    files[2].unlink()
    files[2].symlink_to("nowhere.png")
    size = (40_000).to_bytes(4, "big")
    data = files[3].read_bytes()
    files[3].write_bytes(data[:16] + size + size + data[24:])
    return files


def test_bad_files_are_named_and_left_out(tmp_path: Path) -> None:
    bad = damage(write_folder(tmp_path, range(100)))
    data = load(tmp_path, bad=0.05)
    assert sum(len(part) for part in parts(data)) == 96
    assert len(data.bad_files) == 4
    for file, told, reason in zip(bad, data.bad_files, ("empty", "not an image", "No such file", ""), strict=True):
        assert file.name in told
        assert reason in told
    assert any(note.startswith("4 of 100 images cannot be read") for note in data.notes)
    with pytest.raises(
        RequestError, match=r"4 of 100 images cannot be read, more than max_bad_fraction allows: .*empty"
    ):
        load(tmp_path, bad=0.03)


def cut(file: Path) -> None:
    """Leave the header and some of the pixels of an image file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_behind_the_header(tmp_path: Path, workers: int, capfd: pytest.CaptureFixture[str]) -> None:
    for i in range(60):
        folder = tmp_path / "train" / label(i)
        folder.mkdir(parents=True, exist_ok=True)
        PHOTO.rotate(i).save(folder / f"scan{i:02}.jpg")
    damaged = sorted((tmp_path / "train").rglob("*.jpg"))[7]
    cut(damaged)
    data = load_data(str(tmp_path), val_fraction=0, seed=0, max_bad_fraction=0.02, img_size=16)
    images, position = next(
        (part, i)
        for part in (data.train, data.test)
        if part
        for i in range(len(part))
        if damaged.name in part.name(i)
    )
    transform = eval_transform(preprocessing_of(data, Config(img_size=16)))

    seen = list(eval_loader(images, transform, 8, workers))
    labels = np.delete(images.labels, position)
    assert torch.cat([y for _, y in seen]).tolist() == labels.tolist()
    assert [Path(name).name for name in images.failed] == [damaged.name]
    assert f"unreadable image left out: {tmp_path}" in capfd.readouterr().err

    replaced, number = images[position]
    follower = images[(position + 1) % len(images)]
    assert (replaced.tobytes(), number) == (follower[0].tobytes(), follower[1])
    loader = train_loader(images, transform, batch_size=len(images), seed=0, workers=workers)
    assert len(next(iter(loader))[1]) == len(images)

    images.max_bad = 0
    with pytest.raises(RequestError, match=r"^1 of 60 images cannot be read"):
        list(eval_loader(images, transform, 8, workers))
    with pytest.raises(RequestError, match=r"^1 of 60 images cannot be read"):
        next(iter(train_loader(images, transform, batch_size=len(images), seed=0, workers=workers)))


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_in_several_splits_is_counted_together(tmp_path: Path, workers: int) -> None:
    files = []
    for i in range(60):
        folder = tmp_path / ("train", "val", "test")[i // 20] / label(i % 20)
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / f"{i:02}.jpg")
        PHOTO.rotate(i).save(files[-1])
    files[0].write_text("no image")
    for i in (5, 25, 45):
        cut(files[i])

    def read(allowed: int) -> list[ImageSet]:
        data = load_data(str(tmp_path), val_fraction=0, seed=0, max_bad_fraction=allowed / 60, img_size=16)
        transform = eval_transform(preprocessing_of(data, Config(img_size=16)))
        for images in parts(data):
            list(eval_loader(images, transform, 8, workers))
        return list(parts(data))

    sets = read(4)
    assert [Path(name).name for images in sets for name in images.failed] == ["05.jpg", "25.jpg", "45.jpg"]
    half = sets[0].subset(np.arange(10))
    assert [half.name(i) for i in range(10) if half.read(i) is None] == half.failed
    with pytest.raises(RequestError, match=r"^4 of 60 images cannot be read, more than .*45\.jpg.* \.\.\.; "):
        read(3)
