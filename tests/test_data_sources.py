"""Properties of every kind of data: real CIFAR-10, worker processes, the cache, and missing data."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from convmixer.config import Config
from convmixer.data import datasets
from convmixer.data.cache import Cached
from convmixer.data.loader import eval_loader, train_loader
from convmixer.data.transforms import eval_transform, preprocessing_of, train_transform
from convmixer.errors import RequestError
from convmixer.preprocess import Preprocessing
from data_sets import load, parts, write_folder, write_parquet, write_tar


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
