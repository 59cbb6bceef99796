"""Photos kept decoded: the same pixels in memory, on disk and without, and nothing stale, damaged or too large."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from convmixer.config import Config, override
from convmixer.data import cache, keep
from convmixer.data.cache import Cached, Slots, least_side, shrink
from convmixer.data.datasets import DataSplits
from convmixer.data.keep import Kept, keep_decoded
from convmixer.data.loader import train_loader
from convmixer.data.transforms import (
    eval_transform,
    prepared_transform,
    preprocessing_of,
    train_transform,
)
from convmixer.evaluation.val import val
from convmixer.recipes import load_recipe
from convmixer.train.folder import RunFiles
from convmixer.train.run import train
from data_sets import load, parts

PHOTO = Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427
CONFIG = Config(img_size=32, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3), hflip=0.5, val_fraction=0.2)
SIDE = least_side(32, CONFIG.scale, CONFIG.ratio)  # 53


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of photographs of many sizes, some smaller than what is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(20):
            side = 40 if number < 5 else 100 + 5 * number
            left = 7 * number + (100 if name == "b" else 0)
            part = PHOTO.crop((left, 10, left + side + 20, 10 + side))
            part.save(tmp_path / "data" / name / f"{number}.jpg", exif=turned(number))
    return tmp_path / "data"


def turned(number: int) -> Image.Exif:
    """Return notes that say the image is stored sideways, for some."""
    exif = Image.Exif()
    if number % 4 == 0:
        exif[0x0112] = 6
    return exif


def kept(data: DataSplits, where: str, **more: Any) -> Kept:
    config = override(CONFIG, {"cache": where, **more})
    return keep_decoded(config, data, preprocessing_of(data, config))


def read(images: Any) -> list[bytes]:
    return [images[i][0].tobytes() for i in range(len(images))]


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_images_are_the_same_when_they_come_back(photos: Path, where: str) -> None:
    data = load(photos, img_size=32)
    found = kept(data, where)
    assert found.where == where
    train = parts(data)[0]
    expected = [shrink(train[i][0], SIDE).tobytes() for i in range(len(train))]
    for _ in range(2):  # decoded, then as kept
        assert read(found.sets["train"]) == expected
    slots = found.sets["train"].source._slots
    assert all(slots.get(i, 3) is not None for i in train.indices)
    again = kept(load(photos, img_size=32, seed=1), where).sets["train"]  # another seed holds out other images
    there = [again.source._slots.get(i, 3) is not None for i in again.indices]
    assert any(there) == (where == "disk")
    assert sorted(read(found.sets["train"])) == sorted(expected)


def test_validation_is_the_same_to_the_bit(photos: Path) -> None:
    data = load(photos, img_size=32)
    p = preprocessing_of(data, override(CONFIG, {"crop_pct": 0.9}))
    found = keep_decoded(override(CONFIG, {"cache": "memory", "crop_pct": 0.9}), data, p)
    for _ in range(2):
        for i in range(len(found.sets["val"])):
            seen = prepared_transform(p)(found.sets["val"][i][0])
            assert torch.equal(seen, eval_transform(p)(parts(data)[1][i][0]))


def test_small_photos_are_trained_on_as_without(photos: Path) -> None:
    data = load(photos, img_size=32)
    small = np.array([min(parts(data)[0][i][0].size) <= SIDE for i in range(len(parts(data)[0]))])
    assert small.any()
    p = preprocessing_of(data, CONFIG)
    chosen = np.flatnonzero(small)
    batches = [
        next(iter(train_loader(images.subset(chosen), train_transform(CONFIG, p), batch_size=len(chosen), seed=0)))[0]
        for images in (parts(data)[0], kept(data, "memory").sets["train"])
    ]
    assert torch.equal(*batches)


def test_what_changes_is_said(photos: Path) -> None:
    (note,) = kept(load(photos, img_size=32), "memory").notes
    assert "MiB of decoded images are kept in memory" in note
    assert "training images are first made 53 px on the shorter side" in note
    (note,) = kept(load(photos, img_size=300), "disk", img_size=300).notes
    assert note.endswith("kept on disk; pixels are the same as without --cache")


def test_a_resized_photo_differs_little(photos: Path) -> None:
    """Crops are resized twice: the difference in levels of 255 that docs/data.md names."""
    crop = (0, 0, 427, 427)
    direct = np.asarray(PHOTO.crop(crop).resize((32, 32), Image.Resampling.BICUBIC), float)
    small = shrink(PHOTO, SIDE)
    twice = np.asarray(small.crop((0, 0, SIDE, SIDE)).resize((32, 32), Image.Resampling.BICUBIC), float)
    assert np.abs(direct - twice).mean() < 4
    for scale, ratio in (((0.5, 1.0), (3 / 4, 4 / 3)), ((1.0, 1.0), (1.0, 1.0)), ((0.08, 1.0), (3 / 4, 4 / 3))):
        side = least_side(32, scale, ratio)
        area = scale[0] * side * side * 1.0
        assert min((area * r) ** 0.5 for r in ratio) >= 31.99 or min((area / r) ** 0.5 for r in ratio) >= 31.99


def test_a_file_that_changes_is_not_taken_from_the_disk(photos: Path) -> None:
    read(kept(load(photos, img_size=32), "disk").sets["train"])
    changed = photos / "a" / "7.jpg"
    size = changed.stat().st_size
    with changed.open("rb+") as file:
        file.seek(size // 2)
        file.write(b"\1\2\3")
    os.utime(changed, ns=(1, 1))
    data = load(photos, img_size=32)
    train = parts(data)[0]
    expected = [shrink(train[i][0], SIDE).tobytes() for i in range(len(train))]
    assert read(kept(data, "disk").sets["train"]) == expected


def test_damage_on_disk_is_decoded_again(photos: Path) -> None:
    data = load(photos, img_size=32)
    expected = read(kept(data, "disk").sets["train"])
    for file in (photos.parent / "cache" / "convmixer" / "images").iterdir():
        whole = np.frombuffer(file.read_bytes(), np.uint8).copy()
        whole[::97] ^= 1
        file.write_bytes(whole.tobytes())
    assert read(kept(data, "disk").sets["train"]) == expected


def test_without_room_images_are_made_alike_and_a_line_says_so(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(photos, img_size=32)
    expected = read(kept(data, "memory").sets["train"])
    monkeypatch.setattr(keep, "available_bytes", lambda: 1000)
    found = kept(data, "memory")
    assert (found.where, read(found.sets["train"])) == ("memory", expected)
    assert found.notes[0].startswith("there is no room for 0 MiB of decoded images (memory): each epoch decodes them")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.os, "posix_fallocate", full, raising=False)
    found = kept(data, "disk")
    assert (found.where, read(found.sets["train"])) == ("disk", expected)
    assert "there is no room" in found.notes[0]
    assert not list((photos.parent / "cache" / "convmixer" / "images").iterdir())
    monkeypatch.setattr(keep, "_dominates", lambda *_: True)
    monkeypatch.setattr(cache, "_free", lambda _: 1000)
    found = kept(data, "auto")
    assert (found.where, found.sets) == ("off", {})
    assert "do not fit in memory" in found.notes[0]


def test_auto_keeps_what_is_worth_it(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(photos, img_size=32)
    for dominates in (True, False):
        monkeypatch.setattr(keep, "_dominates", lambda *_, it=dominates: it)
        assert kept(data, "auto").where == ("memory" if dominates else "off")
    monkeypatch.setattr(keep, "_dominates", lambda *_: True)
    assert kept(data, "auto", epochs=1).where == "off"
    assert kept(data, "auto", freeze="all").where == "off"  # each image is read once for its features
    assert kept(data, "auto", epochs=0, max_time="1h").where == "memory"
    assert kept(data, "auto", freeze="1").where == "memory"
    monkeypatch.undo()
    for name, photo in (("a", PHOTO), ("b", PHOTO.rotate(180))):  # large: nearly all the time goes into decoding
        for number in range(20):
            photo.save(photos / name / f"{number}.jpg", quality=95 - number)
    assert kept(load(photos, img_size=32), "auto").where == "memory"


def test_old_files_make_room_for_new_ones(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(photos, img_size=32)
    read(kept(data, "disk").sets["train"])
    folder = photos.parent / "cache" / "convmixer" / "images"
    old = set(folder.iterdir())
    total = sum(file.stat().st_size for file in old)
    monkeypatch.setattr(cache, "_free", lambda _: 2 * total if not old & set(folder.iterdir()) else total // 2)
    assert kept(data, "disk", img_size=31).where == "disk"
    assert not old & set(folder.iterdir())


def test_slots_hold_what_fits_and_no_more() -> None:
    slots = Slots(np.array([12, 0, 6]))
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    for index in range(3):
        slots.put(index, pixels)
    assert np.array_equal(slots.get(0, 3), pixels)  # type: ignore[arg-type]
    assert slots.get(1, 3) is None
    assert slots.get(2, 3) is None


def test_a_run_says_where_they_are_and_val_measures_the_same(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"model": "convmixer_8_1_p4_k3", "img_size": 32, "batch_size": 8, "epochs": 2, "workers": 1, "draw": False}
    config = override(load_recipe("finetune"), {**tiny, "cache": "memory"})
    train(str(photos), config, out=tmp_path / "run")
    assert "decoded images are kept in memory" in capsys.readouterr().out
    files = RunFiles(tmp_path / "run")
    assert files.read_config()["settings"]["cache"] == "memory"
    results = files.read_results()
    assert results
    assert val(tmp_path / "run", split="val")["top1"] == pytest.approx(results["val_top1"])


def test_a_spawned_worker_opens_the_same_file(photos: Path) -> None:
    import pickle

    source = kept(load(photos, img_size=32), "disk").sets["train"].source
    assert isinstance(source, Cached)
    source.image(3, 3)
    assert pickle.loads(pickle.dumps(source))._slots.get(3, 3) is not None
