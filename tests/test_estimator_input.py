"""The images and labels that `ConvMixerClassifier` accepts, and its errors for others."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.exceptions import DataConversionWarning, NotFittedError

from convmixer import ConvMixerClassifier

QUICK: dict[str, Any] = {
    "recipe": "digits",
    "model": "convmixer_8_1_p4_k3",
    "epochs": 1,
    "batch_size": 16,
    "workers": 0,
    "img_size": 16,
}
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (20, 16, 12, 3), np.uint8)
LABELS = np.array([0, 1] * 10)
FIRST = "channels first"
FLOATS = "floats from 0 to 1"


@pytest.fixture(scope="module")
def fitted() -> ConvMixerClassifier:
    return ConvMixerClassifier(**QUICK).fit(COLOUR, LABELS)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (COLOUR.transpose(0, 3, 1, 2), (FIRST,)),
        (list(COLOUR.transpose(0, 3, 1, 2)), (FIRST,)),
        (torch.from_numpy(COLOUR), ()),
        (torch.from_numpy(COLOUR).permute(0, 3, 1, 2).float() / 255, (FIRST, FLOATS)),
        (list(torch.from_numpy(COLOUR).permute(0, 3, 1, 2)), (FIRST,)),
        (COLOUR / 255, (FLOATS,)),
        ((COLOUR / 255).astype(np.float32), (FLOATS,)),
        ([Image.fromarray(image) for image in COLOUR], ()),
    ],
    ids=["NCHW", "list CHW", "tensor", "float tensor NCHW", "list of tensors", "float64", "float32", "PIL"],
)  # fmt: skip
def test_images_of_any_form_are_the_same_images(
    fitted: ConvMixerClassifier, images: Any, said: tuple[str, ...]
) -> None:
    np.testing.assert_array_equal(fitted.predict_proba(images), fitted.predict_proba(COLOUR))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = ConvMixerClassifier(**QUICK).fit(images, LABELS)
    lines = [str(warning.message) for warning in caught]
    assert len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines, strict=True))
    np.testing.assert_array_equal(again.predict_proba(COLOUR), fitted.predict_proba(COLOUR))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (COLOUR[0], r"\(16, 12, 3\) is a single image: expected \(N, H, W\) grey or \(N, H, W, 3\) colour"),
        (
            torch.from_numpy(COLOUR[0]).permute(2, 0, 1),
            r"one image with 3 channels or 3 grey images: pass X\[None\] or",
        ),
        (Image.fromarray(COLOUR[0]), "single image"),
        ("cat.png", "single image"),
        (Path("cat.png"), "single image"),
        (["cat.png"] * 20, "no file 'cat.png'"),
        (COLOUR.reshape(20, -1), "is a table of shape .* reshape its rows"),
        (COLOUR[..., :2], "neither 1, 3 nor 4 channels: expected"),
        (COLOUR[None], "expected .N, H, W. grey"),
        (COLOUR[:0], "0 images"),
        ([], "0 images"),
        (COLOUR[:, :0], "no pixels"),
        (COLOUR.astype(np.float32), "not from 0 to 1"),
        (np.full((20, 8, 8), np.nan), "not from 0 to 1"),
        (COLOUR.astype(int), "must be uint8"),
        (COLOUR.tolist(), "must be uint8"),
        (COLOUR.astype(np.uint16), "must be uint8"),
        ([*COLOUR[:19], None], "image 19 of X is a NoneType"),
        (5, "X is a int"),
        (np.ma.masked_greater(COLOUR, 250), r"X has masked values: fill them, e.g. X.filled\(0\)"),
        (list(np.ma.masked_greater(COLOUR, 250)), "X has masked values"),
    ],
)
def test_what_is_no_images_is_refused(fitted: ConvMixerClassifier, images: Any, message: str) -> None:
    for call in (fitted.predict, lambda X: ConvMixerClassifier(**QUICK).fit(X, LABELS)):
        with pytest.raises(ValueError, match=message):
            call(images)


def test_a_table_with_one_column_of_files_is_taken(fitted: ConvMixerClassifier, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(20)]
    for image, file in zip(COLOUR, files, strict=True):
        Image.fromarray(image).save(file)
    expected = fitted.predict_proba(files)
    for table in (pd.DataFrame({"path": map(str, files)}), np.array(files, str)[:, None]):
        np.testing.assert_array_equal(fitted.predict_proba(table), expected)
    with pytest.raises(ValueError, match="is a table of shape"):
        fitted.predict(pd.DataFrame({"path": map(str, files), "label": LABELS}))


def test_a_column_of_labels_is_taken_with_a_warning(fitted: ConvMixerClassifier) -> None:
    with pytest.warns(DataConversionWarning, match="column-vector"):
        model = ConvMixerClassifier(**QUICK).fit(COLOUR, LABELS[:, None])
    np.testing.assert_array_equal(model.predict(COLOUR), fitted.predict(COLOUR))
    assert ConvMixerClassifier(**QUICK).fit(COLOUR, torch.from_numpy(LABELS)).classes_.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.eye(2)[LABELS], r"\(20, 2\) instead: for one-hot rows pass y.argmax"),
        ([*[0.0, 1.0] * 9, np.nan, 1.0], "y contains NaN"),
        (LABELS + 0.5 * RNG.random(20), "continuous"),
        (np.zeros(20), "two classes or more, but y holds one class"),
        (["a", "a ", "b", "b"] * 5, "same name, or a name is empty"),
        (["", "", "b", "b"] * 5, "same name, or a name is empty"),
        (["nan", "b"] * 10, "label is missing"),
        (["e\u0301", "\u00e9"] * 10, "Unicode"),
        (LABELS[:3], "20 images but 3 labels"),
        (None, "requires y to be passed, but the target y is None"),
        (np.ma.masked_equal(LABELS, 1), "y has masked values"),
        (pd.array([None, "b"] * 10, dtype="string"), "y contains missing labels"),
    ],
)
def test_labels_that_are_none_are_refused(labels: Any, message: str) -> None:
    model = ConvMixerClassifier(**QUICK)
    with pytest.raises(ValueError, match=message):
        model.fit(COLOUR, labels)
    with pytest.raises(NotFittedError):
        model.predict(COLOUR)


def test_labels_of_any_type_come_back_in_their_order() -> None:
    scans = load_digits()
    images = np.round(scans.images * 255 / 16).astype(np.uint8)[:60]
    for labels in (scans.target[:60] - 12, scans.target[:60] > 4, (scans.target[:60] + 5).astype(float)):
        model = ConvMixerClassifier(**QUICK | {"epochs": 2}).fit(images, labels)
        assert (model.classes_ == np.unique(labels)).all()
        assert model.predict(images).dtype == labels.dtype
        known = model.classifier_.predict([Image.fromarray(image) for image in images], 1)
        assert [str(label) for label in model.predict(images)] == [best[0][0] for best in known]


def test_errors_name_no_folder_that_is_gone() -> None:
    same = np.repeat(COLOUR[:1], 20, axis=0)
    with pytest.raises(ValueError, match=r"image-0000000\.png") as caught:  # equal images with two labels
        ConvMixerClassifier(**QUICK).fit(same, LABELS)
    assert "/" not in str(caught.value)


def test_images_that_are_left_out_are_said() -> None:
    images = np.concatenate([COLOUR, COLOUR[:1]])  # a copy with another label: neither can be trusted
    with pytest.warns(UserWarning, match=r"2 of 21 images cannot be used and are left out: image-0000000\.png"):
        ConvMixerClassifier(**QUICK, max_bad_fraction=0.1).fit(images, [*LABELS, 1])


def test_the_run_may_be_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert ConvMixerClassifier(**QUICK, out=".").fit(COLOUR, LABELS).run_ == here
    assert (tmp_path / "here-images" / "images.csv").is_file()
