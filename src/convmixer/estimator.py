"""A classifier of images with scikit-learn's interface: `fit`, `predict`, `predict_proba`, `score`.

    from convmixer import ConvMixerClassifier
    model = ConvMixerClassifier(epochs=10).fit(images, labels)
    model.predict(new_images)

It trains and predicts by the same code as the command line. Rows of a table become images by a reshape, e.g.
`FunctionTransformer(lambda X: X.reshape(-1, 8, 8))` before it in a pipeline.
"""

import contextlib
import csv
import dataclasses
import inspect
import io
import itertools
import random
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import assert_all_finite, check_is_fitted, column_or_1d

from convmixer.config import Config, override
from convmixer.data.in_memory import Batch, as_images, check_unmasked, is_file, opened
from convmixer.data.labels import NO_LABEL, check_names, tidy_name
from convmixer.errors import RequestError, unknown
from convmixer.inference import Classifier, finite, load_classifier, softmax
from convmixer.preprocess import preprocess, to_mode
from convmixer.recipes import load_recipe
from convmixer.run_folder import is_run

Images = np.ndarray | Sequence[Image.Image | np.ndarray | Path | str]
BATCH = 64
MOST_COPIES = 1000  # most copies of one image, if its weight is a whole number
WEIGHT = "weight"  # the column of weights in the table of images
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # modes that PNG stores without loss
RECIPE = "recipe"
FITTED = ("classes_", "run_", "classifier_")
SETTINGS = {field.name: RECIPE for field in dataclasses.fields(Config)} | {"val_fraction": 0.0, "test_fraction": 0.0}


class ConvMixerClassifier(ClassifierMixin, BaseEstimator):
    """An image classifier.

    Args:
        recipe: Name of the recipe that the settings start from.
        out: Folder for the run. If it already holds a run, for instance of an earlier `fit`, the first free one of
            FOLDER-2, FOLDER-3, ... is used. Images given as arrays are kept in FOLDER-images. None: nothing is kept
            on disk.
        verbose: 0: only warnings; 1: print settings, epochs and results.
        **settings: Any setting of `Config`, e.g. epochs=10, weights="convmixer_256_8.cifar10". The default is the
            string "recipe", which means the recipe's value. Two settings default to 0, so that `fit` trains on all
            images it gets: `val_fraction` and `test_fraction`.

    Attributes:
        classes_: The labels seen in `fit`, sorted.
        run_: The run folder of the last `fit` with weights, curves and record; None if none was kept.
        classifier_: The trained `inference.Classifier`.

    Raises:
        RequestError: A setting is not known.
    """

    def __init__(
        self, recipe: str = "finetune", out: str | Path | None = None, verbose: int = 0, **settings: Any
    ) -> None:
        self.recipe, self.out, self.verbose = recipe, out, verbose
        for name in settings:
            if name not in SETTINGS:
                raise unknown("setting", name, SETTINGS)
        for name, default in SETTINGS.items():
            setattr(self, name, settings.get(name, default))

    def fit(
        self, X: Images, y: Sequence[Any] | np.ndarray, sample_weight: Sequence[float] | np.ndarray | None = None
    ) -> "ConvMixerClassifier":
        """Train on all labelled images, except those that `val_fraction` or `test_fraction` hold out.

        The process's random generators are not changed; all randomness comes from `seed`.

        Args:
            X: An array or tensor (N, H, W), (N, H, W, 3) or (N, 3, H, W) of type uint8, float in [0, 1], or uint16
                (only grey images). Or a sequence of PIL images, arrays or paths.
            y: N labels of any type that sorts, (N,) or (N, 1). str(label) is the name of the class: it must differ
                between classes, and have no spaces at its ends.
            sample_weight: (N,) numbers of at least 0; 0 leaves an image out. If all N are equal, they change nothing.
                If all are whole numbers up to 1000, each image is repeated that often, so [1, 2] makes an epoch of 3
                images and [2, 4] one of 6. Otherwise they are factors in the loss, and only their ratios matter.

        Raises:
            ValueError: Images, labels and settings do not fit together. RequestError is a subclass of ValueError.
        """
        for name in FITTED:
            self.__dict__.pop(name, None)  # if this fit fails, the results of an earlier fit must not remain
        images, warned = as_images(X)
        copies, weights = _copies(sample_weight, len(images))
        labels, classes = _labels(y, copies)
        recipe = load_recipe(self.recipe)
        config = override(recipe, self._settings() | ({} if weights is None else {"weight_column": WEIGHT}))
        for line in warned:
            warnings.warn(line, stacklevel=2)
        with _generators_kept(), self._folders() as (folder, out):
            table = _write(images, labels, folder, copies, weights)
            classifier = self._train(str(table), config, recipe, out)
        self.classifier_: Classifier = classifier if self.out is not None else _without_paths(classifier)
        self.classes_ = classes
        self.run_ = out if self.out is not None else None
        return self

    def predict_proba(self, X: Images) -> np.ndarray:
        """Return the probability of each class, (N, classes) in the order of `classes_`.

        Raises:
            NotFittedError: `fit` has not been called, or has failed.
            ValueError: X is not what `fit` takes.
        """
        return softmax(self._logits(X))

    def predict_log_proba(self, X: Images) -> np.ndarray:
        """Return the logarithm of the probability of each class, as `predict_proba` does."""
        logits = self._logits(X)
        logits = logits - logits.max(axis=1, keepdims=True)
        found: np.ndarray = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return found

    def predict(self, X: Images) -> np.ndarray:
        """Return the likeliest label of each image, (N,)."""
        likeliest = self._logits(X).argmax(axis=1)
        labels: np.ndarray = self.classes_[likeliest]
        return labels

    def _logits(self, X: Images) -> np.ndarray:
        """Return float64 (N, classes) in the order of `classes_`."""
        check_is_fitted(self)
        images, _ = as_images(X)  # `fit` turns its notes into warnings; here they would repeat with every call
        p, known = self.classifier_.preprocessing, self.classifier_.classes
        order = [known.index(tidy_name(str(label))) for label in self.classes_]
        found = np.zeros((len(images), len(order)))
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            inputs = np.stack([preprocess(opened(image, p.in_chans, p.bits), p) for image in batch])
            found[start : start + len(batch)] = finite(self.classifier_.logits(inputs))[:, order]
        return found

    def _settings(self) -> dict[str, Any]:
        """Return the settings that override the recipe."""
        values = {name: getattr(self, name) for name in SETTINGS}
        given = {name: value for name, value in values.items() if not (isinstance(value, str) and value == RECIPE)}
        return given if self.out is not None else {"draw": False} | given

    def _train(self, table: str, config: Config, recipe: Config, out: Path) -> Classifier:
        from convmixer.train.folder import RunFiles
        from convmixer.train.run import train

        try:
            run = train(table, config, out=out, recipe=recipe, recipe_name=self.recipe, quiet=not self.verbose)
            for note in RunFiles(out).read_config()["data"]["notes"] if not self.verbose else ():
                if "left out" in note:
                    warnings.warn(_without_folder(note, table), stacklevel=3)
            return load_classifier(run["run"], device=config.device)
        except RequestError as error:
            raise RequestError(_without_folder(str(error), table)) from None

    @contextlib.contextmanager
    def _folders(self) -> Iterator[tuple[Path, Path]]:
        """Yield a folder for the images and one for the run; both are deleted afterwards if nothing is to be kept."""
        if self.out is None:
            with tempfile.TemporaryDirectory(prefix="convmixer-") as name:
                yield Path(name), Path(name) / "run"
            return
        out = Path(self.out)
        out = _unused(out if out.name.strip(".") else out.resolve())  # "." and ".." have no name to add to
        folder = _images_of(out)
        folder.mkdir(parents=True)
        try:
            yield folder, out
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False  # images, not rows of numbers
        tags.input_tags.three_d_array = True
        return tags


def _signature() -> inspect.Signature:
    """Return the constructor's signature with every setting by name: scikit-learn reads the parameters from it."""
    known = list(inspect.signature(ConvMixerClassifier.__init__).parameters.values())[:-1]
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature([*known, *(inspect.Parameter(n, kind, default=d) for n, d in SETTINGS.items())])


ConvMixerClassifier.__init__.__signature__ = _signature()  # type: ignore[attr-defined]


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Restore the state of Python's, numpy's and torch's random generators afterwards."""
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _labels(y: Any, copies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return N labels, and the classes of the images with a weight above 0.

    Raises:
        ValueError: There is not one label per image, or a label's str() cannot be the name of a class.
    """
    if y is None:
        raise ValueError("ConvMixerClassifier requires y to be passed, but the target y is None")
    check_unmasked(y, "y")
    y = np.asarray(y.detach().cpu() if hasattr(y, "detach") else y)
    if y.ndim > 1 and y.shape[1] != 1:
        raise ValueError(
            f"y should be a 1d array of {len(copies)} labels, got an array of shape {y.shape} instead: "
            "for one-hot rows pass y.argmax(axis=1)"
        )
    labels: np.ndarray = column_or_1d(y, warn=True)
    try:
        assert_all_finite(labels, input_name="y")
    except TypeError:  # pandas' NA has no truth value
        raise ValueError("y contains missing labels: leave those images out") from None
    if len(labels) != len(copies):
        raise RequestError(f"{len(copies)} images but {len(labels)} labels")
    check_classification_targets(labels)
    classes = np.unique(labels[copies > 0])
    names = [str(label) for label in classes]
    if len(names) < 2:
        raise RequestError(f"a classifier needs two classes or more, but y holds one class: {names[0]!r}")
    if len(set(names)) < len(names) or not all(name and name == name.strip() for name in names):
        raise RequestError(f"two classes have the same name, or a name is empty or has spaces at its ends: {names}")
    if missing := [name for name in names if name.lower() in NO_LABEL]:
        raise RequestError(f"the label {missing[0]!r} means that the label is missing: leave those images out")
    check_names(names)
    return labels, classes


def _copies(sample_weight: Any, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return how often to repeat each image, (N,) int64, and its factor in the loss, (N,).

    The factors are None if the repetitions express the weights exactly.

    Raises:
        ValueError: The weights are not N finite numbers of at least 0.
    """
    if sample_weight is None:
        return np.ones(count, np.int64), None
    check_unmasked(sample_weight, "sample_weight")
    weights = np.asarray(sample_weight, float)
    if weights.shape != (count,):
        raise ValueError(f"sample_weight.shape == {weights.shape}, expected {(count,)}!")
    if not weights.any():
        raise RequestError("every weight of sample_weight is zero: no image is left")
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise RequestError("sample_weight must be finite numbers of at least 0")
    if (weights == weights[0]).all():
        return np.ones(count, np.int64), None
    if ((weights <= MOST_COPIES) & (weights == np.round(weights))).all():
        return weights.astype(np.int64), None
    return (weights > 0).astype(np.int64), weights


def _without_paths(classifier: Classifier) -> Classifier:
    """Return the classifier with metadata that do not name files in a deleted folder."""
    gone = {"source": "ConvMixerClassifier.fit", "found": "ConvMixerClassifier.fit"}
    about = {name: value for name, value in classifier.describe.items() if name != "data"} | gone
    loaded = classifier.loaded
    if loaded is not None:
        metadata = {name: value for name, value in loaded.metadata.items() if name != "data"}
        loaded = dataclasses.replace(loaded, metadata=metadata, source=Path(), found=gone["found"])
    return dataclasses.replace(classifier, describe=about, loaded=loaded)


def _without_folder(text: str, table: str) -> str:
    """Return a message without the folder of the table, which is deleted before anybody reads it."""
    return text.replace(table, "X").replace(f"{Path(table).parent}/", "")


def _images_of(out: Path) -> Path:
    return out.with_name(f"{out.name}-images")


def _unused(folder: Path) -> Path:
    """Return the folder, or if it holds a run, the first of folder-2, folder-3, ... that does not."""
    names = (f"{folder}-{number}" for number in itertools.count(2))
    path = folder
    while is_run(path) or _images_of(path).exists():
        path = Path(next(names))
    return path


def _write(
    images: Batch, labels: np.ndarray, folder: Path, copies: np.ndarray, weights: np.ndarray | None = None
) -> Path:
    """Write images that are not files as lossless files, and a table of path, label and weight; return the table."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["path", "label", *([] if weights is None else [WEIGHT])])
    for number, (image, label, times) in enumerate(zip(images, labels, copies, strict=True)):
        if not times:
            continue
        path = str(Path(image).absolute()) if is_file(image) else _saved(opened(image), folder, number)
        weight = [] if weights is None else [repr(float(weights[number]))]
        writer.writerows([[path, str(label), *weight]] * times)
    table = folder / "images.csv"
    table.write_text(text.getvalue(), encoding="utf-8")
    return table


def _saved(image: Image.Image, folder: Path, number: int) -> str:
    if image.mode.startswith("I"):  # stored as 16-bit PNG; reading the table finds out how many bits are used
        image = Image.fromarray(np.asarray(image).clip(0, 65535).astype(np.uint16))
    elif image.mode not in PNG_MODES:
        image = to_mode(image, 1 if image.mode == "F" else 3)
    path = folder / f"image-{number:07d}.png"
    image.save(path, compress_level=1)
    return path.name
