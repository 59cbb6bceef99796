"""The scikit-learn interface, on real digits."""

import pickle
import random
from pathlib import Path
from typing import Any

import cloudpickle
import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV

from convmixer import ConvMixerClassifier
from convmixer.data.datasets import load_data
from convmixer.errors import RequestError
from convmixer.estimator import _write
from convmixer.models.weights import load_model
from convmixer.preprocess import to_mode
from convmixer.records import read

SMALL: dict[str, Any] = {"recipe": "digits", "model": "convmixer_32_2_p1_k3", "epochs": 14, "lr": 0.01, "workers": 0}
QUICK: dict[str, Any] = SMALL | {"model": "convmixer_8_1_p2_k3", "epochs": 1, "batch_size": 16}
SCANS = load_digits()
CHOSEN = SCANS.target < 3
IMAGES = np.round(SCANS.images * 255 / 16).astype(np.uint8)[CHOSEN]  # (537, 8, 8)
LABELS = np.array(["zero", "one", "two"])[SCANS.target[CHOSEN]]


@pytest.fixture(scope="module")
def fitted() -> ConvMixerClassifier:
    return ConvMixerClassifier(**SMALL).fit(IMAGES[:400], LABELS[:400])


def test_fit_and_predict(fitted: ConvMixerClassifier) -> None:
    assert fitted.classes_.tolist() == ["one", "two", "zero"]
    assert fitted.run_ is None
    assert fitted.score(IMAGES[400:], LABELS[400:]) > 0.8
    probabilities = fitted.predict_proba([Image.fromarray(image) for image in IMAGES[400:470]])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert (fitted.classes_[probabilities.argmax(axis=1)] == fitted.predict(IMAGES[400:470])).all()
    np.testing.assert_allclose(fitted.predict_log_proba(IMAGES[400:470]), np.log(probabilities), atol=1e-9)


def test_nothing_is_left_or_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    ConvMixerClassifier(**QUICK).fit(IMAGES[:40], LABELS[:40])
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""
    ConvMixerClassifier(**QUICK, verbose=1).fit(IMAGES[:40], LABELS[:40])
    assert "epoch 1/1" in capsys.readouterr().out


def test_all_images_are_trained_on_unless_asked(tmp_path: Path) -> None:
    for fractions, train in (({}, 100), ({"val_fraction": 0.25, "test_fraction": 0.2}, 60)):
        model = ConvMixerClassifier(out=tmp_path / f"{train}", **QUICK, **fractions).fit(IMAGES[:100], LABELS[:100])
        record = read(Path(model.run_) / "record.jsonl")[0]  # type: ignore[arg-type]
        assert record.data["train"] == train
        assert (record.results["test_n"] or 0) == (20 if fractions else 0)


def test_the_run_can_be_kept(tmp_path: Path) -> None:
    files: list[Any] = []
    for i, pixels in enumerate(IMAGES[:60]):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(files[-1])
    files[5] = Image.open(files[5]).convert("CMYK")  # no PNG holds this
    model = ConvMixerClassifier(out=tmp_path / "run", **QUICK)
    model.fit(files, SCANS.target[:60] % 2)
    assert model.run_ == tmp_path / "run"
    assert load_model(tmp_path / "run").classes == ("0", "1")
    assert sorted(path.name for path in (tmp_path / "run-images").iterdir()) == ["image-0000005.png", "images.csv"]
    for again in (model, clone(model)):  # each in a folder of its own
        again.fit(files, SCANS.target[:60] % 2)
    assert (model.run_, again.run_) == (tmp_path / "run-2", tmp_path / "run-3")
    assert model.predict(files[:3]).dtype == model.classes_.dtype


@pytest.mark.parametrize(("dtype", "white"), [(np.int32, 65535), (np.uint16, 65535), (np.uint16, 4095)])
def test_wide_integers_are_trained_on_as_they_are_predicted(tmp_path: Path, dtype: type, white: int) -> None:
    wide = [Image.fromarray(np.round(pixels * white / 16).astype(dtype)) for pixels in SCANS.images[:60]]
    table = _write(wide, SCANS.target[:60] % 2, tmp_path, np.ones(60, int))
    data = load_data(str(table), val_fraction=0, seed=0, max_bad_fraction=0)
    assert data.in_chans == 1
    assert data.train is not None
    for i in range(len(data.train)):
        expected = to_mode(wide[int(Path(data.train.name(i)).stem[-7:])], 1, data.bits)
        assert data.train[i][0].tobytes() == expected.tobytes()


def test_files_of_16_bits_keep_theirs(tmp_path: Path) -> None:
    arrays = np.round(SCANS.images[:60] * 4095 / 16).astype(np.uint16)
    files = [str(tmp_path / f"{i}.png") for i in range(60)]
    for path, pixels in zip(files, arrays, strict=True):
        Image.fromarray(pixels).save(path)
    model = ConvMixerClassifier(**QUICK).fit(files, SCANS.target[:60] % 2)
    assert model.classifier_.preprocessing.bits == 12
    np.testing.assert_array_equal(model.predict_proba(files), model.predict_proba(arrays))


@pytest.mark.parametrize("dump", [pickle, joblib, cloudpickle], ids=lambda module: module.__name__)
def test_a_fitted_model_can_be_stored(fitted: ConvMixerClassifier, dump: Any, tmp_path: Path) -> None:
    file = tmp_path / "model"
    with file.open("wb") as stream:
        dump.dump(fitted, stream)
    with file.open("rb") as stream:
        again = (joblib if dump is joblib else pickle).load(stream)
    np.testing.assert_array_equal(again.predict_proba(IMAGES[:9]), fitted.predict_proba(IMAGES[:9]))
    assert b"/convmixer-" not in pickle.dumps(fitted)  # the folder that is gone


def test_grid_search_in_two_processes() -> None:
    search = GridSearchCV(ConvMixerClassifier(**QUICK), {"lr": [0.001, 0.01]}, cv=2, n_jobs=2, error_score="raise")
    search.fit(IMAGES[:60], LABELS[:60])
    assert search.best_params_["lr"] in (0.001, 0.01)
    assert set(search.predict(IMAGES[:9])) <= set(LABELS)


def test_whole_weights_are_copies() -> None:
    weights = np.arange(40) % 3
    weighted = ConvMixerClassifier(**QUICK).fit(IMAGES[:40], LABELS[:40], weights)
    order = np.repeat(np.arange(40), weights)
    repeated = ConvMixerClassifier(**QUICK).fit(IMAGES[order], LABELS[order])
    np.testing.assert_array_equal(weighted.predict_proba(IMAGES[:9]), repeated.predict_proba(IMAGES[:9]))


def test_fractional_weights_count_in_the_loss() -> None:
    """Each picture twice with different labels: the label with more weight wins, whatever the sum of the weights."""
    scans, labels = np.tile(IMAGES[:40], (2, 1, 1)), np.repeat([0, 1], 40)
    scans[40:, 0, 0] = 1  # not byte-identical, which would be refused
    for heavier in (0, 1):
        weights = np.where(labels == heavier, 0.9, 0.1)
        fitted = ConvMixerClassifier(**QUICK | {"epochs": 20}).fit(scans, labels, weights)
        assert (fitted.predict(IMAGES[:40]) == heavier).mean() > 0.9
    fitted, doubled = (ConvMixerClassifier(**QUICK).fit(scans, labels, weights * scale) for scale in (1, 2048))
    np.testing.assert_array_equal(fitted.predict_proba(IMAGES[:9]), doubled.predict_proba(IMAGES[:9]))


def test_weights_that_cannot_be() -> None:
    for wrong in (np.full(40, np.nan), np.arange(40) - 1.5, np.zeros(40), np.ones(39)):
        with pytest.raises(ValueError, match=r"sample_weight"):
            ConvMixerClassifier(**QUICK).fit(IMAGES[:40], LABELS[:40], wrong)


def test_parameters() -> None:
    model = clone(ConvMixerClassifier(epochs=3).set_params(lr=0.1, recipe="digits"))
    given = {name: value for name, value in model.get_params().items() if value not in ("recipe", 0)}
    assert given == {"recipe": "digits", "out": None, "epochs": 3, "lr": 0.1}
    assert vars(model).keys() == model.get_params().keys()
    assert repr(model) == "ConvMixerClassifier(epochs=3, lr=0.1, recipe='digits')"
    with pytest.raises(ValueError, match="Invalid parameter 'epoch'"):
        model.set_params(epoch=3)
    with pytest.raises(RequestError, match="did you mean 'epochs'"):
        ConvMixerClassifier(epoch=3)


def test_a_failed_fit_leaves_nothing_fitted() -> None:
    model = ConvMixerClassifier(**QUICK)
    with pytest.raises(NotFittedError):
        model.predict(IMAGES[:4])
    model.fit(IMAGES[:40], LABELS[:40])
    with pytest.raises(RequestError, match="40 images but 39 labels"):
        model.fit(IMAGES[:40], LABELS[:39])
    with pytest.raises(NotFittedError):
        model.predict(IMAGES[:4])
