"""The classifier in the tools of tables: pipelines that reshape rows, pandas' columns and series, searches."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from convmixer import ConvMixerClassifier

QUICK: dict[str, Any] = {
    "recipe": "digits",
    "model": "convmixer_8_1_p2_k3",
    "epochs": 1,
    "batch_size": 16,
    "workers": 0,
}
SCANS = load_digits(n_class=3, as_frame=True)
ROWS = SCANS.data[:60]  # a table of 64 columns, 0 to 16
NAMES = SCANS.target[:60].map({0: "zero", 1: "one", 2: "two"})


def as_images(rows: Any) -> np.ndarray:
    """(N, 64) from 0 to 16 -> grey images (N, 8, 8)."""
    return np.round(np.asarray(rows) * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)


def test_a_pipeline_reshapes_the_rows_of_a_table() -> None:
    pipeline = make_pipeline(FunctionTransformer(as_images), ConvMixerClassifier(**QUICK))
    pipeline.fit(ROWS, NAMES)
    assert list(pipeline.classes_) == ["one", "two", "zero"]
    assert pipeline.predict_proba(ROWS).shape == (60, 3)
    direct = ConvMixerClassifier(**QUICK).fit(as_images(ROWS), NAMES.to_numpy())
    np.testing.assert_allclose(pipeline.predict_proba(ROWS), direct.predict_proba(as_images(ROWS)), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_is_cross_validated() -> None:
    pipeline = make_pipeline(FunctionTransformer(as_images), ConvMixerClassifier(**QUICK))
    assert cross_val_score(pipeline, ROWS, NAMES, cv=2).shape == (2,)


@pytest.mark.filterwarnings("ignore:A column-vector y")
@pytest.mark.parametrize("kind", [pd.Series, pd.DataFrame, pd.Categorical])
def test_labels_of_pandas(kind: Any) -> None:
    labels = kind(NAMES.to_list())
    fitted = ConvMixerClassifier(**QUICK).fit(as_images(ROWS), labels)
    assert list(fitted.classes_) == ["one", "two", "zero"]


def test_a_column_of_files(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(60)]
    for path, image in zip(paths, as_images(ROWS), strict=True):
        Image.fromarray(image).save(path)
    table = pd.DataFrame({"file": [str(path) for path in paths], "name": NAMES.to_list()}, index=range(100, 160))
    fitted = ConvMixerClassifier(**QUICK).fit(table["file"], table["name"])
    assert fitted.predict(table["file"]).shape == (60,)
