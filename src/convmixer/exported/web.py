"""The web folder: a page that classifies images in the browser. `model.js` holds the ONNX model as base64 text."""

import base64
import gzip
import json
import lzma
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import convmixer
from convmixer.errors import RequestError
from convmixer.exported import onnx

if TYPE_CHECKING:
    from convmixer.exported.source import Source

MAX_BYTES = 2**31  # an ONNX file has less than 2 GiB


_PAGE = Path(convmixer.__file__).parent / "serve"
_SCRIPTS = ("ort.js", "runtime.js", "model.js", "imaging.js", "local.js")
# the browser enforces that nothing is uploaded, because no connection is allowed
_POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'self' "
    "'wasm-unsafe-eval'; style-src 'self'; img-src 'self' data: blob:; connect-src 'none'; base-uri 'none'; "
    "form-action 'none'\">"
)


def write(path: Path, source: "Source") -> None:
    """Write the page, the runtime and the model as files that work from a static server or from disk.

    Binary parts are base64 text in scripts: a page opened from disk may run scripts but not read other files.
    """
    path.mkdir()
    facts = {name: json.loads(text) for name, text in source.texts.items()}
    facts["samples"] = [data_uri(picture) for picture in source.pictures]
    facts["onnx"] = base64.b64encode(onnx.to_bytes(source)).decode()
    (path / "model.js").write_text(f"globalThis.CONVMIXER_MODEL = {json.dumps(facts)};\n", encoding="utf-8")
    (path / "runtime.js").write_text(f'globalThis.CONVMIXER_RUNTIME = "{_runtime()}";\n', encoding="utf-8")
    for name in ("page.css", "page.js", "imaging.js", "local.js"):
        shutil.copyfile(_PAGE / name, path / name)
    for name in ("ort.js", "LICENSE", "ThirdPartyNotices.txt"):
        shutil.copyfile(_PAGE / "vendor" / name, path / (name if name == "ort.js" else f"onnxruntime-{name}"))
    page = (_PAGE / "page.html").read_text(encoding="utf-8").replace("<!-- policy -->", _POLICY)
    tags = "\n".join(f'<script defer src="{name}"></script>' for name in _SCRIPTS)
    (path / "index.html").write_text(page.replace("<!-- scripts -->", tags), encoding="utf-8")


def check(path: Path) -> None:
    """Check the ONNX model in a page; see `onnx.check`."""
    onnx.check_bytes(_model(path))


def _runtime() -> str:
    """Return the WebAssembly file of ONNX Runtime, gzipped, as base64."""
    wasm = lzma.decompress((_PAGE / "vendor" / "ort.wasm.xz").read_bytes())
    return base64.b64encode(gzip.compress(wasm, mtime=0)).decode()


def data_uri(image: bytes) -> str:
    """Return a PNG or JPEG file as a data: URI."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def read(path: Path, threads: int) -> tuple[Callable[[np.ndarray], Any], dict[str, str]]:
    """Return a function that runs the ONNX model of a web folder on a batch, and the model's metadata.

    Raises:
        RequestError: The folder holds no model.
    """
    return onnx.read_bytes(_model(path), path, threads)


def _model(path: Path) -> bytes:
    """Return the ONNX model in a web folder."""
    script = path / "model.js"
    if script.stat().st_size > MAX_BYTES:
        raise RequestError(f"{script} is larger than {MAX_BYTES / 2**30:.0f} GiB")
    found = re.search(rb'"onnx":\s*"([A-Za-z0-9+/=]+)"', script.read_bytes())
    if not found:
        raise RequestError(f"{script} holds no model: write it again with `convmixer export --format web`")
    return base64.b64decode(found[1], validate=True)
