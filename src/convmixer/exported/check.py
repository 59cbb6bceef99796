"""Checks that an exported file agrees with its model: both classify the same real images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

from convmixer.data.options import Options
from convmixer.errors import RequestError
from convmixer.exported.load import open_exported
from convmixer.preprocess import Preprocessing, load_image, preprocess, to_mode
from convmixer.run_folder import sample_files
from convmixer.text import terminal

if TYPE_CHECKING:
    from convmixer.evaluation.data import EvaluationData
    from convmixer.models.weights import LoadedModel

# The largest allowed logit difference, as a share of the largest logit, and the smallest allowed share of images with
# the same top-1 class. For int8 the printed accuracy is what matters; the limit here only catches broken exports.
TOLERANCE = {"fp32": (1e-3, 0.995), "fp16": (5e-2, 0.98), "int8": (float("inf"), 0.8)}
CALIBRATION = 512  # training images for int8; an eighth of this if the input is larger than SMALL_SIDE
SMALL_SIDE = 64  # pixels; up to this size 1000 images are checked, else 64, so that it takes under a minute


class ExportError(RuntimeError):
    """The exported file does not agree with the model; nothing was kept on disk."""


@dataclass(frozen=True)
class Images:
    """Real images for the check and the calibration.

    Args:
        name: Where the images are from.
        check: Images on which the file and the model are compared.
        labels: The classes of the `check` images, or None if the model has other classes.
        calibration: Training images, for int8; empty if there are none.
    """

    name: str
    check: Sequence[Image.Image]
    labels: np.ndarray | None
    calibration: Sequence[Image.Image]


def real_images(loaded: "LoadedModel", data: str | None, limit: int | None, options: Options | None = None) -> Images:
    """Return images to check and calibrate on: from `find_data`, else the samples saved with the weights.

    Args:
        loaded: The model; its metadata name the data set that it was trained on.
        data: A different data set, or None.
        limit: Images to check on; None: 1000, or 64 if the input is larger than 64 pixels.
        options: What the user said about the columns, folders and groups of `data`.

    Raises:
        RequestError: `data` or `options` are given, and the data cannot be loaded.
    """
    from convmixer.evaluation.data import find_data

    limit = limit or (1000 if loaded.preprocessing.img_size <= SMALL_SIDE else 64)
    try:
        found = find_data(data, loaded.metadata, loaded.source, options)
    except RequestError as error:
        if data or (options and options.given()):
            raise
        print(f"not checked on the training data: {terminal(error)}")
    else:
        return _of_data(found, loaded, limit)
    chans = loaded.preprocessing.in_chans
    files = sample_files(loaded.source)
    if files:
        return Images("the samples saved with the weights", [load_image(file, chans) for file in files], None, ())
    return Images("photographs of scikit-learn", _photographs(64, chans), None, ())


def _of_data(data: "EvaluationData", loaded: "LoadedModel", limit: int) -> Images:
    splits = data.splits
    held_out = next(part for part in (splits.test, splits.val, splits.train) if part is not None)
    order = np.random.default_rng(0).permutation(len(held_out))[:limit]
    found = [item for i in order if (item := held_out.read(int(i))) is not None]
    calibration: list[Image.Image] = []
    if splits.train is not None:
        count = CALIBRATION if loaded.preprocessing.img_size <= SMALL_SIDE else CALIBRATION // 8
        chosen = np.random.default_rng(1).permutation(len(splits.train))[:count]
        calibration = [item[0] for i in chosen if (item := splits.train.read(int(i))) is not None]
    labels = np.array([label for _, label in found]) if splits.classes == loaded.classes else None
    return Images(splits.name, [image for image, _ in found], labels, calibration)


def _photographs(count: int, in_chans: int) -> list[Image.Image]:
    """Return square crops of two photographs, in many sizes."""
    from sklearn.datasets import load_sample_images

    photographs = [to_mode(Image.fromarray(pixels), in_chans) for pixels in load_sample_images().images]
    random = np.random.default_rng(0)
    cuts = []
    for number in range(count):
        image = photographs[number % len(photographs)]
        side = int(random.integers(32, min(image.size)))
        left, top = (int(random.integers(0, length - side + 1)) for length in image.size)
        cuts.append(image.crop((left, top, left + side, top + side)))
    return cuts


def compare(
    model: nn.Module, path: Path, preprocessing: Preprocessing, images: Images, precision: str
) -> dict[str, Any]:
    """Return how the outputs of an exported file differ from the model's on real images.

    Args:
        model: Maps (B, C, H, W) to a tuple that begins with the logits.
        path: The file or folder.
        preprocessing: How an image becomes the input.
        images: Its `check` images are compared.
        precision: Chooses the tolerance.

    Raises:
        ExportError: They differ more than `TOLERANCE`.
    """
    exported = open_exported(path)
    expected, got = [], []
    # uneven batches, so that a file whose batch is not dynamic fails
    for batch in batches(images.check, preprocessing, sizes=(1, 7, 32)):
        with torch.inference_mode():
            expected.append(model(torch.from_numpy(batch))[0].numpy())
        got.append(exported.run(batch)[0])
    return _judge(np.concatenate(expected), np.concatenate(got), images, precision)


def _judge(expected: np.ndarray, got: np.ndarray, images: Images, precision: str) -> dict[str, Any]:
    difference = float(np.abs(expected - got).max())
    same = float((expected.argmax(1) == got.argmax(1)).mean())
    report: dict[str, Any] = {"images": len(expected), "images_from": images.name}
    report |= {"max_logit_difference": difference, "top1_agreement": 100 * same}
    if images.labels is not None:
        report["top1_model"] = 100 * float((expected.argmax(1) == images.labels).mean())
        report["top1_export"] = 100 * float((got.argmax(1) == images.labels).mean())
    share, least = TOLERANCE[precision]
    allowed = share * max(1.0, float(np.abs(expected).max()))
    if not (difference <= allowed and same >= least):  # `not`: NaN must fail too
        raise ExportError(
            f"the exported model does not agree with the original on {len(expected)} images: logits differ by up to "
            f"{difference:.3g} (allowed {allowed:.3g}), top-1 agrees on {same:.2%} (needed {least:.1%}); "
            "no file was kept"
        )
    return report


def batches(images: Sequence[Image.Image], p: Preprocessing, sizes: Sequence[int] = (32,)) -> Iterator[np.ndarray]:
    """Yield all images as float32 (B, C, H, W); B is each of `sizes` in turn, and then stays the last of them."""
    start, steps = 0, list(sizes)
    while start < len(images):
        size = steps.pop(0) if len(steps) > 1 else steps[0]
        yield np.stack([preprocess(image, p) for image in images[start : start + size]])
        start += size
