"""Converts the images that callers pass (arrays, tensors, PIL images, files) for `preprocess` and the data table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convmixer.preprocess import load_image

Batch = np.ndarray | Sequence[Any]
CHANNELS = (1, 3, 4)  # grey; colour; colour and transparency
EXPECTED = "expected (N, H, W) grey or (N, H, W, 3) colour"
CHANNELS_FIRST = "the images have their channels first: (N, C, H, W) is converted to (N, H, W, C)"
FLOATS = "floats from 0 to 1 are rounded to 8-bit values"


def is_file(image: Any) -> bool:
    """Return whether an image is the path of a file."""
    return isinstance(image, (str, Path))


def as_images(X: Any) -> tuple[Batch, list[str]]:
    """Return images, and a line for each conversion that the caller did not ask for.

    Args:
        X: (N, H, W), (N, H, W, C) or (N, C, H, W) of uint8, uint16 (grey only), bool or floats from 0 to 1; a torch
            tensor of these; or a sequence of PIL images, files, and arrays or tensors of single images; or a table
            with one column of these.

    Returns:
        The images, each an array (H, W) or (H, W, C) of uint8 or uint16, a PIL image, or a path; and the lines.

    Raises:
        ValueError: X is something else; the message names the expected shape.
    """
    if is_file(X) or isinstance(X, Image.Image):
        raise ValueError("X is a single image: pass a list of images, [image]")
    if hasattr(X, "toarray"):
        raise ValueError("Sparse data was passed for X, but dense data is required: images are not sparse matrices")
    if _is_array(X):
        if not isinstance(X, np.ndarray) and X.ndim == 3 and X.shape[0] in (3, 4):
            what = f"one image with {len(X)} channels or {len(X)} grey images"
            raise ValueError(f"X, a tensor of shape {tuple(X.shape)}, may be {what}: pass X[None] or X[:, None]")
        X = _numpy(X)
    elif getattr(X, "ndim", 1) == 2:  # a data frame
        X = np.asarray(X)
    if isinstance(X, np.ndarray):
        if X.dtype.kind in "OUS" and X.ndim == 2 and X.shape[1] == 1:  # a table with one column of files or images
            X = X[:, 0]
        if X.dtype.kind not in "OUS" or X.ndim == 2:
            return _batch(X)
    elif not hasattr(X, "__len__"):
        raise ValueError(f"X is a {type(X).__name__}: {EXPECTED}")
    images: list[Any] = list(X)
    if not images:
        raise ValueError(f"X holds 0 images (0 sample(s)): {EXPECTED}")
    if all(isinstance(image, (list, tuple)) for image in images):
        return _batch(np.asarray(images))
    lines: dict[str, None] = {}
    found = [_one(image, number, lines) for number, image in enumerate(images)]
    return found, list(lines)


def opened(image: Any, in_chans: int = 3, bits: int = 16) -> Image.Image:
    """Return one of the images of `as_images` as a PIL image, decoded.

    Raises:
        ImageError, OSError: It is a file that cannot be read.
    """
    if isinstance(image, Image.Image):
        return image
    if is_file(image):
        return load_image(Path(image), in_chans, bits)
    return Image.fromarray(image.squeeze(2) if image.ndim == 3 and image.shape[2] == 1 else image)


def _is_array(X: Any) -> bool:
    return isinstance(X, np.ndarray) or hasattr(X, "detach")


def _numpy(X: Any) -> np.ndarray:
    check_unmasked(X, "X")
    values: np.ndarray = X.detach().cpu().numpy() if hasattr(X, "detach") else X
    return values


def check_unmasked(values: Any, what: str) -> None:
    """Check that no value is hidden by numpy's mask, which all later steps would ignore.

    Raises:
        ValueError: Values are masked.
    """
    if np.ma.is_masked(values):
        raise ValueError(f"{what} has masked values: fill them, e.g. {what}.filled(0), or leave them out")


def _batch(X: np.ndarray) -> tuple[Batch, list[str]]:
    """Return the images of one array."""
    if X.ndim == 2:
        raise ValueError(f"X is a table of shape {X.shape}: {EXPECTED}; reshape its rows, X.reshape(-1, H, W)")
    if X.ndim not in (3, 4):
        raise ValueError(f"X has shape {X.shape}: {EXPECTED}")
    if X.ndim == 3 and X.shape[2] in CHANNELS:
        raise ValueError(f"X of shape {X.shape} is a single image: {EXPECTED}; pass X[None]")
    if not len(X):
        raise ValueError(f"X of shape {X.shape} holds 0 images (0 sample(s)): {EXPECTED}")
    lines: dict[str, None] = {}
    if X.ndim == 4 and X.shape[3] not in CHANNELS:
        if X.shape[1] not in CHANNELS:
            raise ValueError(f"X has shape {X.shape}, with neither 1, 3 nor 4 channels: {EXPECTED}")
        X, lines[CHANNELS_FIRST] = X.transpose(0, 2, 3, 1), None
    return _values(X, "X", X.ndim == 3 or X.shape[3] == 1, lines), list(lines)


def _one(image: Any, number: int, lines: dict[str, None]) -> Any:
    """Return one item of a sequence."""
    what = f"image {number} of X"
    if isinstance(image, Image.Image):
        return image
    if is_file(image):
        if not Path(image).is_file():
            raise ValueError(f"{what}: there is no file {str(image)!r}")
        return image
    if not _is_array(image):
        raise ValueError(f"{what} is a {type(image).__name__}, not an array, a PIL image or a file: {EXPECTED}")
    values = _numpy(image)
    if values.ndim == 3 and values.shape[2] not in CHANNELS and values.shape[0] in CHANNELS:
        values, lines[CHANNELS_FIRST] = values.transpose(1, 2, 0), None
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in CHANNELS):
        raise ValueError(f"{what} has shape {values.shape}: expected (H, W) grey or (H, W, 3) colour")
    return _values(values, what, values.ndim == 2 or values.shape[2] == 1, lines)


def _values(values: np.ndarray, what: str, grey: bool, lines: dict[str, None]) -> np.ndarray:
    """Return values as uint8; values of type uint16 stay as they are."""
    if 0 in values.shape:
        raise ValueError(f"{what} of shape {values.shape} has no pixels: {EXPECTED}")
    if values.dtype == np.uint8 or (values.dtype == np.uint16 and grey):
        return np.ascontiguousarray(values)
    if values.dtype == np.bool_:
        return np.ascontiguousarray(values) * np.uint8(255)
    if values.dtype.kind != "f":
        raise ValueError(f"{what} must be uint8 images or floats from 0 to 1, not {values.dtype}: {EXPECTED}")
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # NaN compares false
        raise ValueError(
            f"{what} has floats from {low:g} to {high:g}, not from 0 to 1: images must be uint8 or floats from 0 to 1"
        )
    lines[FLOATS] = None
    return np.ascontiguousarray(np.round(values * 255).astype(np.uint8))
