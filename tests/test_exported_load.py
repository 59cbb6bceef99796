"""Exported files are loaded without torch if possible, and refused if they are damaged or could run code."""

import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.exports import Exports

from convmixer.errors import RequestError
from convmixer.exported.load import load_exported


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".pt2"])
def test_a_file_that_is_no_export_is_one_clear_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"not a model")
    with pytest.raises(RequestError, match="cannot be read"):
        load_exported(path)
    with pytest.raises(RequestError, match="does not exist"):
        load_exported(tmp_path / f"none{suffix}")


def rewritten(source: Path, path: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """Write a .pt2 file again with the contents of its members changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return path


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_torch_export_that_would_run_code_is_refused(exports: Exports, tmp_path: Path) -> None:
    good, mark = tmp_path / "model.pt2", tmp_path / "ran"
    shutil.copyfile(exports.get("torch")[0], good)
    buffer = io.BytesIO()
    torch.save(Evil(mark), buffer)

    def pickled_weight(name: str, content: bytes) -> bytes:
        if name.endswith("model_weights_config.json"):
            return content.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
        return buffer.getvalue() if name.endswith("weight_0") else content

    def pickled_sample(name: str, content: bytes) -> bytes:
        return buffer.getvalue() if "sample_inputs" in name else content

    def other_call(name: str, content: bytes) -> bytes:
        return content.replace(b"torch.ops.aten.gelu.default", b"torch.os.system", 1)

    def evaluated(name: str, content: bytes) -> bytes:
        if not name.endswith("model.json"):
            return content
        code = f"__import__('pathlib').Path('{mark}').touch()"
        return re.sub(rb'"expr_str": "[^"]+"', f'"expr_str": "{code}"'.encode(), content)

    def compiled(name: str, content: bytes) -> bytes:
        code = f"__import__('pathlib').Path('{mark}').touch() or True"
        return content.replace(b'"guards_code": []', f'"guards_code": ["{code}"]'.encode())

    for change in (pickled_weight, other_call, evaluated):
        with pytest.raises(RequestError, match="could run code"):
            load_exported(rewritten(good, tmp_path / "evil.pt2", change))
        assert not mark.exists()
    images = np.random.default_rng(0).normal(size=(3, 1, 16, 16)).astype(np.float32)
    expected = load_exported(good).run(images)[0]
    for change in (pickled_sample, compiled):  # left out when loading
        loaded = load_exported(rewritten(good, tmp_path / "evil.pt2", change))
        np.testing.assert_array_equal(loaded.run(images)[0], expected)
        assert not mark.exists()
    with zipfile.ZipFile(good, "a") as archive:
        archive.writestr("model/data/aotinductor/model/a.so", b"")
    with pytest.raises(RequestError, match="could run code"):
        load_exported(good)


@pytest.mark.parametrize("format", ["onnx", "web"])
def test_running_an_onnx_file_or_web_folder_imports_no_torch(exports: Exports, format: str) -> None:
    path = exports.get(format, "int8")[0]
    code = (
        "import json, sys, numpy as np\n"
        "from convmixer.exported.load import open_exported\n"
        f"model = open_exported({str(path)!r})\n"
        "logits, _ = model.run(np.zeros((3, 1, 16, 16), np.float32))\n"
        "print(json.dumps([logits.shape, 'torch' in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == [[3, 10], False]
