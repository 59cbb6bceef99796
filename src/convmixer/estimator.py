"""A classifier of images with scikit-learn's interface: `fit`, `predict`, `predict_proba`, `score`.

    from convmixer import ConvMixerClassifier
    model = ConvMixerClassifier(epochs=10).fit(images, labels)
    model.predict(new_images)

It trains and predicts by the same code as the command line. The images are not flattened, so scikit-learn's checks
for tables of numbers do not apply; `clone`, `get_params` and cross-validation over indices do.
"""

import csv
import io
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from convmixer.config import override
from convmixer.errors import RequestError
from convmixer.inference import Classifier, load_classifier
from convmixer.preprocess import load_image, to_mode
from convmixer.recipes import load_recipe
from convmixer.run_folder import is_run

Images = np.ndarray | Sequence[Image.Image | np.ndarray | Path | str]
BATCH = 64
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # that a PNG file gives back as they are


class ConvMixerClassifier(ClassifierMixin, BaseEstimator):
    """An image classifier.

    Args:
        recipe: Name of the recipe whose settings are the start.
        out: Folder for the run; if it holds one already, e.g. of an earlier `fit`, FOLDER-2, FOLDER-3, ...
            (out-2, out-3, ...); None: a temporary one, gone with the process.
        **settings: Any setting of `Config`, over the recipe, e.g. epochs=10, weights="convmixer_256_8.cifar10".

    Attributes:
        classes_: The labels seen in `fit`, sorted.
        run_: The run folder of the last `fit` with weights, curves and record; None if it was temporary.
        classifier_: The trained `inference.Classifier`.
    """

    def __init__(self, recipe: str = "finetune", out: str | Path | None = None, **settings: Any) -> None:
        self.recipe, self.out, self.settings = recipe, out, settings

    def fit(self, X: Images, y: Sequence[Any] | np.ndarray) -> "ConvMixerClassifier":
        """Train on labelled images, as `convmixer train` does with data that come without splits.

        A fifth is held out to test the run, and `val_fraction` (a tenth) of the rest to choose the best epoch.

        Args:
            X: uint8 (N, H, W) grey or (N, H, W, 3) colour, or a sequence of PIL images, arrays or files.
            y: N labels of any type that sorts; their texts must differ and have no spaces around them.

        Raises:
            RequestError: Images, labels and settings do not go together.
        """
        from convmixer.train.run import train

        labels = np.asarray(y)
        if len(X) != len(labels):
            raise RequestError(f"{len(X)} images but {len(labels)} labels")
        self.classes_ = np.unique(labels)
        names = [str(label) for label in self.classes_]
        if len(set(names)) < len(names) or not all(name and name == name.strip() for name in names):
            raise RequestError(f"labels must have different texts without spaces around them, not {names}")
        recipe = load_recipe(self.recipe)
        config = override(recipe, self.settings)
        with tempfile.TemporaryDirectory(prefix="convmixer-") as folder:
            table = _write(X, labels, Path(folder))
            out = _unused(Path(self.out)) if self.out is not None else Path(folder) / "run"
            result = train(str(table), config, out=out, recipe=recipe, recipe_name=self.recipe)
            self.classifier_: Classifier = load_classifier(result["run"])
        self.run_ = out if self.out is not None else None
        return self

    def predict_proba(self, X: Images) -> np.ndarray:
        """Return the probability of each class, (N, classes) in the order of `classes_`.

        Raises:
            NotFittedError: `fit` has not been called.
        """
        check_is_fitted(self)
        names = {str(label): i for i, label in enumerate(self.classes_)}
        found = np.zeros((len(X), len(names)))
        for start in range(0, len(X), BATCH):
            images = [_image(image) for image in X[start : start + BATCH]]
            for row, best in zip(found[start:], self.classifier_.predict(images, len(names)), strict=False):
                for name, probability in best:
                    row[names[name]] = probability
        return found

    def predict(self, X: Images) -> np.ndarray:
        """Return the likeliest label of each image, (N,)."""
        likeliest = self.predict_proba(X).argmax(axis=1)
        labels: np.ndarray = self.classes_[likeliest]
        return labels

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return what the estimator was made with."""
        return {"recipe": self.recipe, "out": self.out, **self.settings}

    def set_params(self, **params: Any) -> "ConvMixerClassifier":
        """Change the recipe, the folder or settings."""
        self.recipe, self.out = params.pop("recipe", self.recipe), params.pop("out", self.out)
        self.settings = self.settings | params
        return self


def _unused(folder: Path) -> Path:
    """Return the folder, or if it is a run, the first of folder-2, folder-3, ... that is none."""
    names = (f"{folder}-{number}" for number in itertools.count(2))
    path = folder
    while is_run(path):
        path = Path(next(names))
    return path


def _write(X: Images, labels: np.ndarray, folder: Path) -> Path:
    """Write images as lossless files and a table of path and label; return the table."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["path", "label"])
    for number, (image, label) in enumerate(zip(X, labels, strict=True)):
        path = folder / f"{number:07d}.png"
        decoded = _image(image)
        if decoded.mode not in PNG_MODES:
            decoded = to_mode(decoded, 1 if decoded.mode.startswith("I") else 3)
        decoded.save(path, compress_level=1)
        writer.writerow([path.name, str(label)])
    table = folder / "images.csv"
    table.write_text(text.getvalue(), encoding="utf-8")
    return table


def _image(image: Image.Image | np.ndarray | Path | str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (Path, str)):
        return load_image(Path(image))
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise RequestError(f"images must be uint8 (H, W) or (H, W, 3), not {image.dtype} {image.shape}")
    return Image.fromarray(image.squeeze(2) if image.ndim == 3 and image.shape[2] == 1 else image)
