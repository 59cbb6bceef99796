"""A column of weights: each training image's weight in the loss, the same with every loader."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from convmixer.config import Config
from convmixer.data import on_device
from convmixer.data.loader import train_loader
from convmixer.data.on_device import DeviceLoader
from convmixer.data.options import Options
from convmixer.data.transforms import preprocessing_of, train_transform
from convmixer.errors import RequestError
from data_sets import label, load, parts, png, write_folder, write_tar

WEIGHTS = Options(weight_column="weight")


def table(root: Path, weight: object = None) -> Path:
    """Write 60 scans and a table that weighs each by its number, or as given."""
    (root / "scans").mkdir(exist_ok=True)
    for i in range(60):
        (root / "scans" / f"{i}.png").write_bytes(png(i))
    rows = [f"scans/{i}.png,{label(i)},{i if weight is None else weight}" for i in range(60)]
    (root / "table.csv").write_text("\n".join(["path,label,weight", *rows]))
    return root / "table.csv"


def numbers(images: object) -> np.ndarray:
    return np.array([int(Path(images.name(i)).stem) for i in range(len(images))])  # type: ignore[attr-defined]


def test_weights_have_a_mean_of_one_and_stay_with_their_images(tmp_path: Path) -> None:
    data = load(table(tmp_path), options=WEIGHTS)
    train = parts(data)[0]
    expected = numbers(train) / numbers(train).mean()
    np.testing.assert_allclose(train.weights, expected, rtol=1e-6)
    assert any(
        note.startswith("training images have the weights of column 'weight' in the loss, from ")
        for note in data.notes
    )
    assert not any("not used, a column" in note for note in data.notes)
    assert load(table(tmp_path)).train.weights is None  # type: ignore[union-attr]
    config = Config(hflip=0.5)
    p = preprocessing_of(data, config)
    pixels = on_device.load(train, p, torch.device("cpu"))
    assert pixels is not None
    for loader in (
        train_loader(train, train_transform(config, p), batch_size=16, seed=0, workers=1),
        DeviceLoader(pixels, train.labels, config, p, batch_size=16, weights=train.weights),
    ):
        _, labels, weights = next(iter(loader))
        chosen = [index for _, index in loader.batch_sampler.batch(0)]  # type: ignore[union-attr]
        np.testing.assert_allclose(weights, expected[chosen], rtol=1e-6)
        assert labels.tolist() == train.labels[chosen].tolist()


def test_weights_of_parquet(tmp_path: Path) -> None:
    columns = {
        "image": [png(i) for i in range(60)],
        "label": [label(i) for i in range(60)],
        "weight": list(range(60)),
    }
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    train = parts(load(tmp_path, options=WEIGHTS))[0]
    np.testing.assert_allclose(train.weights, train.indices / train.indices.mean(), rtol=1e-6)


@pytest.mark.parametrize("weight", ["", "many", "-1", "nan", "inf", "0"])
def test_what_is_no_weight_is_refused(tmp_path: Path, weight: str) -> None:
    with pytest.raises(RequestError, match="column 'weight' must be finite numbers of at least 0, and not all 0"):
        load(table(tmp_path, weight), options=WEIGHTS)


def test_an_option_that_the_data_cannot_use_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", range(60))
    with pytest.raises(RequestError, match=r"--weight-column weight: .*class folders are the labels, cannot use it"):
        load(tmp_path / "folder", options=WEIGHTS)
    with pytest.raises(RequestError, match="--label-column x: the data set digits cannot use it: leave it out"):
        load("digits", options=Options(label_column="x"))
    write_tar(tmp_path / "train.tar", range(60))
    with pytest.raises(RequestError, match=r"--image-root .*: .*tar shards, cannot use it"):
        load(tmp_path / "train.tar", options=Options(image_root=str(tmp_path)))
