"""Evaluation: numbers checked by hand, classes matched by name, bad BatchNorm statistics noticed and repaired."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from convmixer import cli, kernels
from convmixer.errors import RequestError
from convmixer.evaluation.batchnorm import batchnorm_disagreement, recalibrate
from convmixer.evaluation.metrics import evaluate, metrics, per_class
from convmixer.evaluation.val import val
from convmixer.models.convmixer import ConvMixer
from convmixer.models.weights import LoadedModel, load_model, save_model
from convmixer.predict.files import predict_files
from convmixer.preprocess import Preprocessing
from convmixer.seal import make_seal


def resave(loaded: LoadedModel, folder: Path) -> Path:
    """Save a loaded model again, after the test changed it."""
    metadata = {k: v for k, v in loaded.metadata.items() if k not in ("name", "model_args", "version")}
    save_model(
        folder,
        loaded.model,
        architecture="m",
        model_args={},
        classes=loaded.classes,
        preprocessing=loaded.preprocessing,
        **metadata,
    )
    return folder


def test_metrics_by_hand() -> None:
    # confidences 0.6, 0.6, 0.9, 0.9; right, wrong, right, right
    probabilities = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.9, 0.1]])
    result = metrics(probabilities.log(), torch.tensor([0, 1, 1, 0]))
    assert result["top1"] == 75
    assert result["top5"] == 100
    assert result["n"] == 4
    # bins: two images at 0.6 with accuracy 0.5, two at 0.9 with accuracy 1
    assert result["ece"] == pytest.approx(0.5 * abs(0.6 - 0.5) + 0.5 * abs(0.9 - 1.0), abs=1e-6)
    assert result["loss"] == pytest.approx(-np.log([0.6, 0.4, 0.9, 0.9]).mean(), abs=1e-6)
    assert result["ci95"] == pytest.approx([30.06, 95.44], abs=0.01)  # Wilson, 3 of 4


def test_top5_counts_the_five_best() -> None:
    logits = torch.arange(8.0).flip(0).repeat(8, 1)  # class 0 is the likeliest
    assert metrics(logits, torch.arange(8))["top5"] == 100 * 5 / 8


def test_per_class_by_hand() -> None:
    predicted, labels = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 0])
    rows = per_class(torch.nn.functional.one_hot(predicted, 3).float(), labels, ["a", "b", "c"])
    assert [row.name for row in rows] == ["a", "b"]  # c has no images
    assert (rows[0].precision, rows[0].recall, rows[0].n) == (50, 50, 2)
    assert rows[1].f1 == pytest.approx(200 / 3, abs=1e-4)


def test_one_class_is_always_right(tmp_path: Path) -> None:
    for number in range(8):
        path = tmp_path / "data" / "only" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 30 * number, np.uint8)).save(path)
    p, model = Preprocessing(8), ConvMixer(4, 1, 3, 2, num_classes=1)
    data = {"spec": str(tmp_path / "data"), "seal": make_seal(str(tmp_path / "data"))}
    save_model(
        tmp_path / "one",
        model,
        architecture="convmixer_4_1_p2_k3",
        model_args={},
        classes=("only",),
        preprocessing=p,
        data=data,
    )
    result = val(tmp_path / "one", precision="fp32", out=tmp_path / "out")
    (row,) = result["per_class"]
    assert (row["precision"], row["recall"], row["f1"], row["n"]) == (100, 100, 100, result["n"])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["confusion_matrix"] == [[result["n"]]]


def test_data_that_changed_since_the_training_are_warned_of(
    digits_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(digits_weights)
    loaded.metadata["data"] = {**loaded.metadata["data"], "checksum": "sha256:other"}
    changed = resave(loaded, tmp_path / "changed")
    for data in (None, "digits"):
        (warning,) = val(changed, data, limit=20)["warnings"]
        assert "may have been trained on" in warning
    assert "warning: the data at digits have changed" in capsys.readouterr().out
    assert not val(changed, split="train", limit=20)["warnings"]
    loaded.metadata["data"]["spec"] = "elsewhere"
    other = resave(loaded, tmp_path / "other")
    assert not val(other, "digits", limit=20)["warnings"]  # other data than the training's


def test_evaluate_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = ConvMixer(8, 1, 3, 2, num_classes=3).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])), (torch.randn(1, 3, 8, 8), torch.tensor([1]))]
    assert evaluate(model, batches)["n"] == 5
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(RequestError, match="no images"):
        evaluate(model, [])


def test_val_on_the_run_s_own_data(digits_weights: Path, tmp_path: Path) -> None:
    result = val(digits_weights, out=tmp_path / "out")
    assert {"top1", "top5", "n", "ece", "ci95"} <= set(result)
    assert result["top1"] > 90
    assert result["ci95"][0] < result["top1"] < result["ci95"][1]
    assert result["n"] == 360
    assert not result["warnings"]
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    counts = np.array(written["confusion_matrix"])
    assert counts.sum() == 360
    assert 100 * counts.trace() / 360 == pytest.approx(result["top1"])
    assert (tmp_path / "out" / "per_class.csv").read_text().startswith("class,precision,recall,f1,images\n0,")
    with Image.open(tmp_path / "out" / "confusion_matrix.png") as picture:
        assert picture.width > 300


def test_val_in_int8_is_calibrated_on_training_images(digits_weights: Path) -> None:
    if reason := kernels.why_not():
        pytest.skip(f"no CPU kernels: {reason}")
    assert abs(val(digits_weights, precision="int8")["top1"] - val(digits_weights, precision="fp32")["top1"]) < 3
    with pytest.raises(RequestError, match="int8 needs images to calibrate on"):
        predict_files(digits_weights, [Path("x.png")], precision="int8")


def test_val_maps_the_order_of_classes(digits_weights: Path, tmp_path: Path) -> None:
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    scans = load_digits()
    for i in range(100):
        folder = tmp_path / "data" / "test" / names[scans.target[i]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(scans.images[i] * 255 / 16).astype(np.uint8)).save(folder / f"{i}.png")
    loaded = load_model(digits_weights)
    named = resave(LoadedModel(loaded.model, tuple(names), loaded.preprocessing), tmp_path / "named")
    result = val(named, str(tmp_path / "data"), batch_size=7)  # folders are sorted by name: another order
    assert result["top1"] > 90
    other = resave(LoadedModel(loaded.model, tuple("abcdefghij"), loaded.preprocessing), tmp_path / "other")
    with pytest.raises(RequestError, match="does not know 10 of the 10"):
        val(other, str(tmp_path / "data"))
    with pytest.raises(RequestError, match="has no train split: choose --split from test"):
        val(named, str(tmp_path / "data"), "train")
    with pytest.raises(RequestError, match="does not say what it was trained on"):
        val(named)


def test_bad_batchnorm_is_warned_of_and_repaired(digits_weights: Path, tmp_path: Path) -> None:
    loaded = load_model(digits_weights)
    good = val(digits_weights)["top1"]
    for block in loaded.model.blocks:
        block[3].running_mean += 3 * block[3].running_var.sqrt()
    spoilt = resave(loaded, tmp_path / "spoilt")
    before = val(spoilt)
    assert before["top1"] < good - 20
    assert before["batchnorm"]["bad"]
    assert "convmixer recalibrate" in before["warnings"][0]
    result = recalibrate(spoilt, None, tmp_path / "repaired", limit=640)
    assert result["images"] == 640
    assert result["top1_after"] > result["top1_before"] + 20
    after = val(tmp_path / "repaired")
    assert after["top1"] > good - 3
    assert not after["warnings"]
    again = load_model(tmp_path / "repaired")
    assert again.metadata["data"] == loaded.metadata["data"]
    assert again.metadata["recalibrated"]["images"] == 640


def test_recalibrated_statistics_are_those_of_the_images(digits_weights: Path, tmp_path: Path) -> None:
    recalibrate(digits_weights, None, tmp_path, limit=128)
    from convmixer.data.datasets import load_data
    from convmixer.data.transforms import eval_transform

    loaded = load_model(tmp_path)
    train = load_data("digits", val_fraction=0.1, seed=0, max_bad_fraction=0.0).train
    assert train is not None
    order = np.random.default_rng(0).permutation(len(train))[:128]
    transform = eval_transform(loaded.preprocessing)
    x = torch.stack([transform(train[int(i)][0]) for i in order])
    with torch.no_grad():
        active = loaded.model.stem[1](loaded.model.stem[0](x))
    mean = active.mean((0, 2, 3))
    torch.testing.assert_close(loaded.model.stem[2].running_mean, mean, rtol=1e-4, atol=1e-5)


def test_a_model_without_batchnorm_has_nothing_to_say() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    assert batchnorm_disagreement(model, [(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]))]) == {}


def test_the_command(digits_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["val", str(digits_weights), "--limit", "50", "--precision", "fp32", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["n"] == 50
    assert any("95% Wilson interval" in line for line in lines)
    assert cli.main(["val", str(digits_weights), "--limit", "0"]) == 2
    assert cli.main(["val", "no_such_weights"]) == 2
