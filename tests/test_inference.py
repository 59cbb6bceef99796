"""Prediction on real image files: right classes, the order given, bad files reported, every output format."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from convmixer import cli
from convmixer.errors import RequestError
from convmixer.estimator import ConvMixerClassifier
from convmixer.inference import load_classifier, softmax
from convmixer.models.convmixer import ConvMixer
from convmixer.models.weights import load_model, save_changed, save_model
from convmixer.predict.files import predict_files
from convmixer.predict.sources import expand
from convmixer.preprocess import Preprocessing, load_image, preprocess


@pytest.fixture(scope="module")
def pngs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[str]]:
    """Real digits as 8-bit PNG files, and their classes."""
    folder = tmp_path_factory.mktemp("pngs")
    scans = load_digits()
    files = []
    for i, pixels in enumerate(scans.images[:40]):
        files.append(folder / f"{i:02}.png")
        Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8)).save(files[-1])
    return files, [str(label) for label in scans.target[:40]]


def test_a_trained_model_names_real_digits(digits_weights: Path, pngs: tuple[list[Path], list[str]]) -> None:
    files, labels = pngs
    result = predict_files(digits_weights, files[::-1], topk=3, batch_size=16)["predictions"]
    assert [p["file"] for p in result] == [str(file) for file in files[::-1]]
    assert sum(p["classes"][0] == label for p, label in zip(result, labels[::-1], strict=True)) >= 36
    for p in result:
        assert len(p["classes"]) == len(p["probabilities"]) == 3
        assert p["probabilities"] == sorted(p["probabilities"], reverse=True)
        assert 0 < sum(p["probabilities"]) <= 1 + 1e-9


@pytest.fixture(scope="module")
def enormous(digits_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that are finite, with outputs that are not."""
    folder = tmp_path_factory.mktemp("enormous")
    loaded = load_model(digits_weights)
    model = cast(Any, loaded.model)
    with torch.no_grad():
        model.blocks[-1][-1].weight.fill_(3e38)
        model.head.weight.mul_(1e6)
    save_changed(folder, loaded)
    return folder


@pytest.mark.parametrize("command", ["predict", "val", "explain"])
def test_outputs_that_are_no_numbers_are_an_error(
    enormous: Path, pngs: tuple[list[Path], list[str]], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--limit", "8"] if command == "val" else [str(pngs[0][0])]
    assert cli.main([command, str(enormous), *arguments]) == 2
    out, err = capsys.readouterr()
    assert "nan" not in out
    assert err.strip().splitlines()[-1].endswith("its training diverged; use other weights")


def test_an_estimator_refuses_outputs_that_are_no_numbers(enormous: Path) -> None:
    estimator = ConvMixerClassifier()
    estimator.classes_, estimator.classifier_ = np.arange(10), load_classifier(enormous)
    with pytest.raises(RequestError, match="the model's outputs are NaN or infinite"):
        estimator.predict(np.zeros((1, 8, 8), np.uint8))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_file_name_that_is_no_text_is_written_as_its_bytes(
    digits_weights: Path, pngs: tuple[list[Path], list[str]], tmp_path: Path, suffix: str
) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9.png")
    try:
        odd.write_bytes(pngs[0][0].read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    out = tmp_path / f"out{suffix}"
    command = [sys.executable, "-m", "convmixer", "predict", str(digits_weights), str(odd), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    assert b"caf\xe9.png" in out.read_bytes()
    assert b"caf" in done.stdout


def test_classifier_equals_the_model(digits_weights: Path, pngs: tuple[list[Path], list[str]]) -> None:
    loaded, classifier = load_model(digits_weights), load_classifier(digits_weights, "fp32")
    images = [load_image(file) for file in pngs[0][:5]]
    batch = np.stack([preprocess(image, loaded.preprocessing) for image in images])
    with torch.no_grad():
        expected = loaded.model(torch.from_numpy(batch)).softmax(1)
    np.testing.assert_allclose(softmax(classifier.logits(batch)), expected.numpy(), atol=1e-5)
    best = classifier.predict(images, topk=99)
    assert [len(row) for row in best] == [10] * 5
    assert [row[0][0] for row in best] == [classifier.classes[i] for i in expected.argmax(1)]
    assert classifier.predict([]) == []


def test_tta_is_the_mean_over_an_image_and_its_mirror_image(
    digits_weights: Path, pngs: tuple[list[Path], list[str]]
) -> None:
    classifier = load_classifier(digits_weights, "fp32")
    batch = np.stack([preprocess(Image.open(path), classifier.preprocessing) for path in pngs[0][:4]])
    plain, mirrored = (softmax(classifier.logits(np.ascontiguousarray(x))) for x in (batch, batch[..., ::-1]))
    found = softmax(classifier.mirrored().logits(batch))
    np.testing.assert_allclose(found, (plain + mirrored) / 2, atol=1e-6)
    assert abs(plain - mirrored).max() > 0.01  # digits are not symmetric, so the mean is another answer


def test_val_and_predict_say_that_they_used_tta(
    digits_weights: Path, pngs: tuple[list[Path], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["val", str(digits_weights), "--tta"]) == 0
    assert "test-time augmentation: mean over each image and its mirror image" in capsys.readouterr().out
    assert cli.main(["predict", str(digits_weights), str(pngs[0][0]), "--tta"]) == 0
    assert "means over each image and its mirror image" in capsys.readouterr().out


def test_bf16_agrees_with_fp32(digits_weights: Path, pngs: tuple[list[Path], list[str]]) -> None:
    images = [load_image(file) for file in pngs[0]]
    tops = [[row[0][0] for row in load_classifier(digits_weights, p).predict(images, 1)] for p in ("fp32", "bf16")]
    assert sum(a == b for a, b in zip(*tops, strict=True)) >= 39


def test_a_photograph_goes_through_a_colour_model(tmp_path: Path) -> None:
    model = ConvMixer(8, 2, 3, 4, num_classes=3)
    p = Preprocessing(32, crop_pct=0.9)
    save_model(tmp_path, model, architecture="m", model_args={}, classes="abc", preprocessing=p)
    photo = Image.fromarray(load_sample_image("flower.jpg"))
    for name, image in (("a.jpg", photo), ("b.png", photo.convert("P")), ("c.tif", photo.convert("CMYK"))):
        image.save(tmp_path / name)
    result = predict_files(tmp_path, [tmp_path])["predictions"]
    assert [Path(r["file"]).name for r in result] == ["a.jpg", "b.png", "c.tif"]
    assert all(abs(sum(r["probabilities"]) - 1) < 1e-9 for r in result)


def test_real_cifar_files(cifar10: Path, tmp_path: Path) -> None:
    parquet = pq.ParquetFile(next(iter(sorted(cifar10.rglob("*test*.parquet")))))
    rows = next(parquet.iter_batches(20)).to_pylist()
    for i, row in enumerate(rows):
        image = next(value for value in row.values() if isinstance(value, dict))
        (tmp_path / f"{i:02}.png").write_bytes(image["bytes"])
    save_model(
        tmp_path / "w",
        ConvMixer(8, 1, 3, 2, num_classes=10),
        architecture="m",
        model_args={},
        classes=list("abcdefghij"),
        preprocessing=Preprocessing(32),
    )
    result = predict_files(tmp_path / "w", [tmp_path], batch_size=8)["predictions"]
    assert [Path(p["file"]).name for p in result] == [f"{i:02}.png" for i in range(20)]
    assert len({tuple(p["probabilities"]) for p in result}) == 20  # every image is its own


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_bad_files_are_reported_and_the_rest_done(
    digits_weights: Path, pngs: tuple[list[Path], list[str]], tmp_path: Path, suffix: str
) -> None:
    good = pngs[0][0]
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    files = [good, tmp_path / "text.png", tmp_path / "none.png", tmp_path / "empty.png", tmp_path / "cut.png", good]
    out = tmp_path / f"preds{suffix}"
    result = predict_files(digits_weights, files, topk=2, batch_size=2, out=out)["predictions"]
    assert ["error" in p for p in result] == [False, True, True, True, True, False]
    if suffix == ".jsonl":
        assert [json.loads(line) for line in out.read_text().splitlines()] == result
        return
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert rows[0]["class_1"] == result[0]["classes"][0]
    assert float(rows[0]["probability_2"]) == result[0]["probabilities"][1]
    assert rows[1]["error"] == result[1]["error"]
    assert rows[1]["class_1"] == ""


def test_folders_are_expanded_in_order(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.PNG", "a/x.jpg", "a/notes.txt", "c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths = [tmp_path / "c.png", tmp_path / "b", tmp_path / "a", tmp_path / "missing.png"]
    files, unused = expand(paths)
    assert [p.name for p in files] == ["c.png", "10.PNG", "2.png", "x.jpg", "missing.png"]
    assert unused.notes() == ["not used, no image: 1 (notes.txt)"]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(RequestError, match="holds no image files"):
        expand([tmp_path / "nothing"])


def test_the_command(
    digits_weights: Path,
    pngs: tuple[list[Path], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights, image = str(digits_weights), str(pngs[0][0])
    assert cli.main(["predict", weights, image, "--topk", "1", "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["predictions"][0]["classes"] == ["0"]
    assert cli.main(["predict", weights, str(tmp_path / "none.png")]) == 1
    assert "none of the 1 files can be read" in capsys.readouterr().err
    for bad in (["--topk", "0"], ["--batch-size", "0"], ["--out", "x.txt"]):
        assert cli.main(["predict", weights, image, *bad]) == 2
    assert cli.main(["predict", str(tmp_path), image]) == 2


def test_module_is_light() -> None:
    import subprocess

    code = "import sys, convmixer.inference; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
