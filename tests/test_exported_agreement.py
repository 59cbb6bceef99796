"""Exports agree with the model on real images and contain their metadata; one that does not agree leaves no file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.exports import ALL, CLASSES, Exports, P

from convmixer.cli import main
from convmixer.errors import RequestError
from convmixer.exported.check import ExportError, Images
from convmixer.exported.export import export_model
from convmixer.exported.formats import FORMATS
from convmixer.exported.load import load_exported
from convmixer.models.create import create_model
from convmixer.models.maps import WithMaps
from convmixer.preprocess import Preprocessing, preprocess


@pytest.mark.parametrize(("format", "precision"), ALL)
def test_export_agrees_and_carries_its_meaning(exports: Exports, format: str, precision: str) -> None:
    path, report = exports.get(format, precision)
    assert report["top1_agreement"] >= (100 if precision == "fp32" else 97)
    assert report["top1_model"] > 80
    assert abs(report["top1_model"] - report["top1_export"]) <= 3
    exported = load_exported(path)
    assert exported.classes == CLASSES
    assert exported.preprocessing == P
    assert exported.describe["architecture"] == "tiny"
    assert exported.describe["precision"] == precision
    assert not list(path.parent.glob(".export-*"))


@pytest.mark.parametrize("format", [name for name, row in FORMATS.items() if not row.folder])
def test_maps_add_up_to_the_logits(exports: Exports, format: str) -> None:
    batch = np.stack([preprocess(image, P) for image in exports.scans.check[:3]])
    logits, maps = load_exported(exports.get(format)[0]).run(batch)
    assert maps is not None
    assert maps.shape == (3, 5, 8, 8)
    order = np.argsort(-logits, axis=1)[:, :5]
    bias = exports.model.head.bias.detach().numpy()
    np.testing.assert_allclose(maps.mean((2, 3)) + bias[order], np.take_along_axis(logits, order, 1), atol=1e-4)


def test_maps_of_the_model_itself_are_exact(exports: Exports) -> None:
    logits, maps = WithMaps(exports.model)(torch.randn(2, 1, 16, 16))
    top = logits.topk(5, dim=1)
    bias = exports.model.head.bias[top.indices]
    torch.testing.assert_close(maps.mean((2, 3)) + bias, top.values, atol=1e-5, rtol=1e-5)


def test_a_model_without_maps_is_exported_with_logits_alone(tmp_path: Path, scans: Images) -> None:
    torch.manual_seed(0)
    model = create_model("resnet10t", num_classes=10, in_chans=1)
    few = Images("digits", scans.check[:9], None, ())
    p = Preprocessing(img_size=32, in_chans=1, mean=(0.3,), std=(0.3,))
    report = export_model(model, CLASSES, p, few, tmp_path / "model.onnx")
    assert "top1_model" not in report
    assert load_exported(tmp_path / "model.onnx").run(np.zeros((2, 1, 32, 32), np.float32))[1] is None


def test_a_wrong_export_is_refused_and_leaves_no_file(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import convmixer.exported.onnx

    right = convmixer.exported.onnx.write

    def wrong(path: Path, source: object) -> None:
        with torch.no_grad():
            source.model.model.head.weight.neg_()  # type: ignore[attr-defined]
        right(path, source)  # type: ignore[arg-type]
        with torch.no_grad():
            source.model.model.head.weight.neg_()  # type: ignore[attr-defined]

    monkeypatch.setattr(convmixer.exported.onnx, "write", wrong)
    with pytest.raises(ExportError, match="does not agree"):
        exports.write(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_int8_needs_training_images(exports: Exports, tmp_path: Path) -> None:
    bare = Images("digits", exports.scans.check, None, ())
    with pytest.raises(RequestError, match="--data"):
        export_model(exports.model, CLASSES, P, bare, tmp_path / "model.onnx", precision="int8")


@pytest.mark.parametrize("limit", ["0", "-5"])
def test_a_check_on_no_images_is_refused(
    digits_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str
) -> None:
    path = tmp_path / "model.onnx"
    assert main(["export", str(digits_weights), "--out", str(path), "--limit", limit]) == 2
    assert f"--limit must be at least 1, not {limit}" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("format", "precision"), ALL)
def test_the_shipped_weights_keep_their_accuracy_in_every_format(
    cifar10: Path, tmp_path: Path, format: str, precision: str
) -> None:
    from convmixer.exported.export import export
    from convmixer.models.registry import shipped

    name = "convmixer_256_8.cifar10"
    if name not in shipped():
        pytest.skip(f"the package ships no {name}")
    report = export(name, format, precision, tmp_path / f"model{FORMATS[format].suffix}", str(cifar10), 1000)
    assert report["images"] == 1000
    assert report["top1_model"] >= 91  # the model card's figure, less the spread of a thousand images
    assert report["top1_agreement"] >= {"fp32": 99.9, "fp16": 99.5, "int8": 97}[precision]
    assert report["top1_model"] - report["top1_export"] <= 0.5
