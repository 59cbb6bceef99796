"""The sample pictures that a page offers. They may be private, so they are shown only if the user asks for them."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from convmixer.errors import RequestError
from convmixer.preprocess import SUFFIXES, load_image
from convmixer.run_folder import RunFolder, is_run

MOST, SIDE = 8, 640
LOSSLESS_SIDE = 64  # pixels; images up to this size become PNG, others JPEG


def choose_samples(choice: str | None, default: Sequence[Path] = ()) -> tuple[list[bytes], str]:
    """Return PNG and JPEG files for a page to offer, and a line for the user that says where they come from.

    The files are encoded again, at most 640 pixels wide and high, without a photo's metadata (place and time).

    Args:
        choice: A run folder, a folder of images, or "none"; None: use `default`.
        default: Image files to use if `choice` is None.

    Raises:
        RequestError: The folder does not exist or holds no image that can be read.
    """
    if choice is None and default:
        return _read(default), f"sample pictures: {min(MOST, len(default))} of {default[0].parent}"
    if choice in (None, "none"):
        return [], "no sample pictures" + ("" if choice else " (--samples RUN or FOLDER adds some)")
    folder = RunFolder(choice).samples if is_run(choice) else Path(choice)
    if not folder.is_dir():
        raise RequestError(f"--samples {choice}: no such folder; give a run, a folder of images, or none")
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES and file.is_file()]
    if not files:
        raise RequestError(f"--samples {choice}: {folder} holds no image files")
    try:
        return _read(files), f"sample pictures: {min(MOST, len(files))} of {folder}"
    except (OSError, ValueError) as error:
        raise RequestError(f"--samples {choice}: {error}") from error


def _read(files: Sequence[Path]) -> list[bytes]:
    return [encode(load_image(file)) for file in files[:MOST]]


def encode(image: Image.Image) -> bytes:
    """Return an image as a PNG file, or a JPEG file if it is large, at most 640 pixels wide or high."""
    image = image.copy()
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    if max(image.size) > LOSSLESS_SIDE:
        image.save(buffer, "JPEG", quality=90)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()
