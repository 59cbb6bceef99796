"""Images that cannot be read: named, counted over all splits and processes, and limited."""

from pathlib import Path

import numpy as np
import pytest
import torch

from convmixer.config import Config
from convmixer.data.datasets import ImageSet, load_data
from convmixer.data.loader import eval_loader, train_loader
from convmixer.data.transforms import eval_transform, preprocessing_of
from convmixer.errors import RequestError
from data_sets import PHOTO, label, load, parts, write_folder


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
    assert any(note.startswith("4 of 100 images cannot be used") for note in data.notes)
    with pytest.raises(
        RequestError, match=r"4 of 100 images cannot be used, more than max_bad_fraction allows: .*empty"
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
    with pytest.raises(RequestError, match=r"^1 of 60 images cannot be used"):
        list(eval_loader(images, transform, 8, workers))
    with pytest.raises(RequestError, match=r"^1 of 60 images cannot be used"):
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
    with pytest.raises(RequestError, match=r"^4 of 60 images cannot be used, more than .*45\.jpg.* \.\.\.; "):
        read(3)
