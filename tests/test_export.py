"""Exports agree with the model on real images, carry their meaning, and leave nothing behind when they do not."""

import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convmixer.cli import main
from convmixer.errors import RequestError
from convmixer.export import PRECISIONS, SUFFIX, ExportError, Images, export_model
from convmixer.exported.load import load_exported
from convmixer.models.maps import WithMaps
from convmixer.models.registry import create_model
from convmixer.preprocess import Preprocessing, preprocess

CLASSES = tuple(f"digit {number}" for number in range(10))
P = Preprocessing(img_size=16, in_chans=1, mean=(0.3,), std=(0.3,))
PAIRS = [(format, precision) for format in PRECISIONS for precision in PRECISIONS[format] if format != "web"]
PAIRS.append(("web", "int8"))  # a web folder holds the ONNX file


@pytest.fixture(scope="module")
def digits() -> Images:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    scans = [Image.fromarray((scan.reshape(8, 8) * 15.9).astype(np.uint8)) for scan in pixels[:360]]
    return Images("digits", scans[:100], labels[:100], scans[100:])


@pytest.fixture(scope="module")
def model(digits: Images) -> torch.nn.Module:
    """A ConvMixer fitted to a few real scans for a second, so that its answers are not ties."""
    torch.manual_seed(0)
    model = create_model("convmixer_16_2_p2_k4", num_classes=10, in_chans=1)
    x = torch.from_numpy(np.stack([preprocess(image, P) for image in digits.check]))
    y = torch.from_numpy(digits.labels)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(30):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    with torch.no_grad():
        for _ in range(30):
            model(x)  # settles BatchNorm's running statistics
    return model.eval()


@pytest.mark.parametrize(("format", "precision"), PAIRS)
def test_export_agrees_and_carries_its_meaning(
    model: torch.nn.Module, digits: Images, tmp_path: Path, format: str, precision: str
) -> None:
    path = tmp_path / f"model{SUFFIX[format]}"
    report = export_model(model, CLASSES, P, digits, path, format, precision, {"architecture": "tiny"})
    assert report["top1_agreement"] >= (100 if precision == "fp32" else 97)
    assert report["top1_model"] > 80
    assert abs(report["top1_model"] - report["top1_export"]) <= 3
    exported = load_exported(path)
    assert exported.classes == CLASSES
    assert exported.preprocessing == P
    assert exported.describe["architecture"] == "tiny"
    assert not list(tmp_path.glob(".export-*"))


@pytest.mark.parametrize("format", [f for f in PRECISIONS if f != "web"])
def test_maps_add_up_to_the_logits(model: torch.nn.Module, digits: Images, tmp_path: Path, format: str) -> None:
    path = tmp_path / f"model{SUFFIX[format]}"
    export_model(model, CLASSES, P, digits, path, format)
    batch = np.stack([preprocess(image, P) for image in digits.check[:3]])
    logits, maps = load_exported(path).run(batch)
    assert maps is not None
    assert maps.shape == (3, 5, 8, 8)
    order = np.argsort(-logits, axis=1)[:, :5]
    bias = model.head.bias.detach().numpy()
    np.testing.assert_allclose(maps.mean((2, 3)) + bias[order], np.take_along_axis(logits, order, 1), atol=1e-4)


def test_maps_of_the_model_itself_are_exact(model: torch.nn.Module) -> None:
    logits, maps = WithMaps(model)(torch.randn(2, 1, 16, 16))
    top = logits.topk(5, dim=1)
    torch.testing.assert_close(maps.mean((2, 3)) + model.head.bias[top.indices], top.values, atol=1e-5, rtol=1e-5)


def test_a_model_without_maps_is_exported_with_logits_alone(tmp_path: Path, digits: Images) -> None:
    torch.manual_seed(0)
    model = create_model("resnet10t", num_classes=10, in_chans=1)
    few = Images("digits", digits.check[:9], None, ())
    p = Preprocessing(img_size=32, in_chans=1, mean=(0.3,), std=(0.3,))
    report = export_model(model, CLASSES, p, few, tmp_path / "model.onnx")
    assert "top1_model" not in report
    assert load_exported(tmp_path / "model.onnx").run(np.zeros((2, 1, 32, 32), np.float32))[1] is None


def test_a_wrong_export_is_refused_and_leaves_no_file(
    model: torch.nn.Module, digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import convmixer.export

    def other(model: torch.nn.Module) -> torch.nn.Module:
        torch.manual_seed(1)
        return WithMaps(create_model("convmixer_16_2_p2_k4", num_classes=10, in_chans=1)).eval()

    monkeypatch.setattr(convmixer.export, "_traced", other)
    with pytest.raises(ExportError, match="does not agree"):
        export_model(model, CLASSES, P, digits, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["web", "onnx"])
def test_what_is_no_export_is_not_written_over(
    model: torch.nn.Module, digits: Images, tmp_path: Path, format: str
) -> None:
    run = tmp_path / f"run{SUFFIX[format]}"
    run.mkdir()
    (run / "weights").write_text("dear")
    with pytest.raises(RequestError, match=r"choose another --out|is a folder"):
        export_model(model, CLASSES, P, digits, run, format)
    assert [file.read_text() for file in run.iterdir()] == ["dear"]


def test_a_page_replaces_an_older_page(model: torch.nn.Module, digits: Images, tmp_path: Path) -> None:
    path = tmp_path / "page"
    for _ in range(2):
        export_model(model, CLASSES, P, digits, path, "web")
        (path / "left-over").write_text("")
    export_model(model, CLASSES, P, digits, path, "web")
    assert not (path / "left-over").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["page"]


def test_int8_needs_training_images(model: torch.nn.Module, digits: Images, tmp_path: Path) -> None:
    bare = Images("digits", digits.check, None, ())
    with pytest.raises(RequestError, match="--data"):
        export_model(model, CLASSES, P, bare, tmp_path / "model.onnx", precision="int8")


@pytest.mark.parametrize("limit", ["0", "-5"])
def test_a_check_on_no_images_is_refused(
    digits_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str
) -> None:
    path = tmp_path / "model.onnx"
    assert main(["export", str(digits_weights), "--out", str(path), "--limit", limit]) == 2
    assert f"--limit must be at least 1, not {limit}" in capsys.readouterr().err
    assert not path.exists()


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


def test_a_torch_export_that_would_run_code_is_refused(
    model: torch.nn.Module, digits: Images, tmp_path: Path
) -> None:
    good, mark = tmp_path / "model.pt2", tmp_path / "ran"
    export_model(model, CLASSES, P, digits, good, "torch")
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
    for change in (pickled_sample, compiled):  # left out when loading
        loaded = load_exported(rewritten(good, tmp_path / "evil.pt2", change))
        np.testing.assert_array_equal(loaded.run(images)[0], load_exported(good).run(images)[0])
        assert not mark.exists()
    with zipfile.ZipFile(good, "a") as archive:
        archive.writestr("model/data/aotinductor/model/a.so", b"")
    with pytest.raises(RequestError, match="could run code"):
        load_exported(good)


@pytest.mark.parametrize("format", ["onnx", "web"])
def test_running_an_onnx_file_or_web_folder_imports_no_torch(
    model: torch.nn.Module, digits: Images, tmp_path: Path, format: str
) -> None:
    path = tmp_path / f"model{SUFFIX[format]}"
    export_model(model, CLASSES, P, digits, path, format)
    code = (
        "import json, sys, numpy as np\n"
        "from convmixer.exported.load import load_exported\n"
        f"model = load_exported({str(path)!r})\n"
        "logits, _ = model.run(np.zeros((3, 1, 16, 16), np.float32))\n"
        "print(json.dumps([logits.shape, 'torch' in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == [[3, 10], False]


@pytest.mark.slow
@pytest.mark.parametrize(("format", "precision"), PAIRS)
def test_the_shipped_weights_keep_their_accuracy_in_every_format(
    cifar10: Path, tmp_path: Path, format: str, precision: str
) -> None:
    from convmixer.export import export
    from convmixer.models.registry import shipped

    name = "convmixer_256_8.cifar10"
    if name not in shipped():
        pytest.skip(f"the package ships no {name}")
    report = export(name, format, precision, tmp_path / f"model{SUFFIX[format]}", str(cifar10), 1000)
    assert report["images"] == 1000
    assert report["top1_model"] >= 91  # the model card's figure, less the spread of a thousand images
    assert report["top1_agreement"] >= {"fp32": 99.9, "fp16": 99.5, "int8": 97}[precision]
    assert report["top1_model"] - report["top1_export"] <= 0.5
