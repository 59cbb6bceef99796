"""The scikit-learn interface, on real digits."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError

from convmixer import ConvMixerClassifier
from convmixer.data.datasets import load_data
from convmixer.errors import RequestError
from convmixer.estimator import _write
from convmixer.models.weights import load_model
from convmixer.preprocess import to_mode

SMALL = {"recipe": "digits", "model": "convmixer_32_2_p1_k3", "epochs": 14, "lr": 0.01, "workers": 0}


def test_fit_and_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # nothing may be left in the current folder
    scans = load_digits()
    images = np.round(scans.images * 255 / 16).astype(np.uint8)
    words = np.array(["zero", "one", "two"])
    chosen = scans.target < 3
    images, labels = images[chosen], words[scans.target[chosen]]
    model = ConvMixerClassifier(**SMALL).fit(images[:400], labels[:400])
    assert model.classes_.tolist() == ["one", "two", "zero"]
    assert model.score(images[400:], labels[400:]) > 0.8
    probabilities = model.predict_proba([Image.fromarray(image) for image in images[400:470]])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert (model.classes_[probabilities.argmax(axis=1)] == model.predict(images[400:470])).all()
    assert not list(tmp_path.iterdir())


def test_the_run_can_be_kept(tmp_path: Path) -> None:
    scans = load_digits()
    files = []
    for i, pixels in enumerate(scans.images[:60]):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8)).save(files[-1])
    files[5] = Image.open(files[5]).convert("CMYK")  # no PNG holds this
    model = ConvMixerClassifier(out=tmp_path / "run", **SMALL | {"epochs": 1, "batch_size": 16})
    model.fit(files, scans.target[:60] % 2)
    assert model.run_ == tmp_path / "run"
    assert load_model(tmp_path / "run").classes == ("0", "1")
    for again in (model, clone(model)):  # each in a folder of its own
        again.fit(files, scans.target[:60] % 2)
    assert (model.run_, again.run_) == (tmp_path / "run-2", tmp_path / "run-3")
    assert load_model(tmp_path / "run-3").classes == ("0", "1")
    assert model.predict(files[:3]).dtype == model.classes_.dtype


@pytest.mark.parametrize(("dtype", "white"), [(np.int32, 65535), (np.uint16, 65535)])
def test_wide_integers_are_trained_on_as_they_are_predicted(tmp_path: Path, dtype: type, white: int) -> None:
    scans = load_digits()
    wide = [Image.fromarray(np.round(pixels * white / 16).astype(dtype)) for pixels in scans.images[:60]]
    data = load_data(str(_write(wide, scans.target[:60] % 2, tmp_path)), val_fraction=0, seed=0, max_bad_fraction=0)
    assert data.in_chans == 1
    assert data.train is not None
    for i in range(len(data.train)):
        expected = to_mode(wide[int(Path(data.train.name(i)).stem)], 1)
        assert data.train[i][0].tobytes() == expected.tobytes()


def test_parameters() -> None:
    model = clone(ConvMixerClassifier(epochs=3).set_params(lr=0.1, recipe="digits"))
    assert model.get_params() == {"recipe": "digits", "out": None, "epochs": 3, "lr": 0.1}
    images = np.zeros((4, 8, 8), np.uint8)
    with pytest.raises(NotFittedError):
        model.predict(images)
    with pytest.raises(RequestError, match="4 images but 3 labels"):
        model.fit(images, [0, 1, 0])
    for labels in (["a", "a ", "b", "b"], ["", "", "b", "b"]):
        with pytest.raises(RequestError, match="different texts"):
            model.fit(images, labels)
    with pytest.raises(RequestError, match="images must be uint8"):
        model.fit(images / 255, [0, 1, 0, 1])
    with pytest.raises(RequestError, match="did you mean 'epochs'"):
        ConvMixerClassifier(epoch=3).fit(images, [0, 1, 0, 1])
