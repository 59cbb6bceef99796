"""The web folder: a page that classifies in the browser, with the ONNX model as base64 text in its `model.js`."""

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convmixer.errors import RequestError
from convmixer.exported import onnx

MAX_BYTES = 2**31  # an ONNX file has less than 2 GiB


def data_uri(image: bytes) -> str:
    """Return a PNG or JPEG file as a data: URI."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def read(path: Path, threads: int) -> tuple[Callable[[np.ndarray], Any], dict[str, str]]:
    """Return what runs the model in a web folder, and its metadata; nothing of it runs but the ONNX model.

    Raises:
        RequestError: The folder holds no model.
    """
    script = path / "model.js"
    if script.stat().st_size > MAX_BYTES:
        raise RequestError(f"{script} is larger than {MAX_BYTES / 2**30:.0f} GiB")
    found = re.search(rb'"onnx":\s*"([A-Za-z0-9+/=]+)"', script.read_bytes())
    if not found:
        raise RequestError(f"{script} holds no model: write it again with `convmixer export --format web`")
    return onnx.read_bytes(base64.b64decode(found[1], validate=True), path, threads)
