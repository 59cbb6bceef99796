"""A real run on the bundled digits: its folder, its result, the step, and what stops it."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from commands import Command
from convmixer import kernels, records
from convmixer.cli import main
from convmixer.config import Config
from convmixer.device import choose_precision
from convmixer.errors import RequestError
from convmixer.models.weights import load_model
from convmixer.train.run import resume, train
from convmixer.train.setup import prepare

TINY = {
    "model": "convmixer_24_2_p1_k3",
    "workers": 0,
    "precision": "fp32",
    "lr": 0.03,
    "batch_size": 64,
    "draw": False,
}


def tiny(**more: Any) -> Config:
    return Config(**{**TINY, "epochs": 2, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "run"
    result = train(
        "digits",
        tiny(epochs=3, ema_decay=0.5, mixup=0.1, cutmix=0.1, mixup_prob=0.3, smoothing=0.1, draw=True),
        out=out,
        recipe_name="digits",
    )
    return out, result


def test_result_and_files(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    assert {*result} == {"run", "val_top1", "test_top1", "epochs", "seconds", "images_per_second"}
    assert result["test_top1"] > 40
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    pictures = ("curves", "augmented", "patch_embedding", "depthwise_kernels")
    for name in ("config.yaml", "metrics.csv", "log.jsonl", "record.jsonl", "README.md", "mistakes.html"):
        assert name in files
    assert "(mistakes.html)" in (out / "README.md").read_text()
    assert "of 360 images are misclassified" in (out / "mistakes.html").read_text()
    assert {f"pictures/{name}.png" for name in pictures} <= files
    assert {f"weights/{w}/{f}" for w in ("best", "last") for f in ("model.safetensors", "config.json")} <= files
    assert sum(name.startswith("samples/") for name in files) == 10
    assert sum(name.startswith("tensorboard/") for name in files) == 1


def test_metrics_and_log_have_one_line_per_epoch(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1.0", "2.0", "3.0"]
    assert [int(row["step"]) for row in rows] == [20, 40, 60]
    assert float(rows[-1]["lr"]) == 0
    events = [json.loads(line)["event"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert events == ["start", "epoch", "epoch", "epoch", "end"]


def test_record_and_config_say_how_to_repeat_it(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    (record,) = records.read(out / "record.jsonl")
    assert record.results["test_top1"] == result["test_top1"]
    assert (record.results["val_n"], record.results["test_n"]) == (144, 360)
    assert "best on the validation split" in record.results["chosen"]
    contents = yaml.safe_load((out / "config.yaml").read_text())
    assert contents["settings"] == record.config
    assert contents["differs_from_recipe"]["lr"] == {"recipe": 0.01, "here": 0.03}
    assert contents["data"]["checksum"] == record.data["checksum"]
    card = (out / "README.md").read_text()
    assert f"{result['test_top1']:.2f}" in card
    assert "read once, at the end" in card


def test_best_weights_carry_their_meaning(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    loaded = load_model(out)
    assert loaded.classes == tuple("0123456789")
    assert (loaded.preprocessing.img_size, loaded.preprocessing.in_chans) == (8, 1)
    assert loaded.metadata["data"]["spec"] == "digits"


def test_a_folder_that_holds_a_run_is_refused(finished: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(RequestError, match="--resume"):
        train("digits", tiny(), out=finished[0])


def test_resuming_a_finished_run_returns_its_result(finished: tuple[Path, dict[str, Any]]) -> None:
    assert resume(finished[0]) == finished[1]


def test_one_process_of_a_slurm_job_with_more_tasks_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"JOB_ID": "1", "JOB_NAME": "job", "NTASKS": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    assert train("digits", tiny(epochs=1), out=tmp_path / "run")["epochs"] == 1


def test_without_validation_the_last_epoch_is_taken(tmp_path: Path) -> None:
    result = train("digits", tiny(val_fraction=0.0, epochs=1), out=tmp_path / "run")
    assert result["val_top1"] is None
    assert result["test_top1"] is not None
    (record,) = records.read(tmp_path / "run" / "record.jsonl")
    assert "last epoch" in record.results["chosen"]
    best, last = (load_model(tmp_path / "run" / "weights" / which).model.state_dict() for which in ("best", "last"))
    assert all(torch.equal(best[key], last[key]) for key in best)


def three_classes(folder: Path) -> Path:
    """Write the digits 0 to 2 as a folder of classes."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if label < 3 and number < 400:
            path = folder / f"{label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(path)
    return folder


def test_names_of_classes_need_not_be_text(tmp_path: Path) -> None:
    data, names = three_classes(tmp_path / "data"), ("a$b$c", "$\\x$", os.fsdecode(b"caf\xe9"))
    try:
        for label, name in enumerate(names):
            (data / str(label)).rename(data / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    result = train(str(data), tiny(epochs=1, draw=True), out=tmp_path / "run")
    assert load_model(result["run"]).classes == tuple(sorted(names))
    assert r"a\$b\$c, caf\\udce9" in (tmp_path / "run" / "README.md").read_text()
    out = tmp_path / "measured"
    Command("val", result["run"], "--out", str(out)).finish(200)
    assert b"\ncaf\xe9," in (out / "per_class.csv").read_bytes()


def test_an_explicit_model_keeps_the_activation_of_its_weights(tmp_path: Path) -> None:
    first = train("digits", tiny(act="relu", epochs=1), out=tmp_path / "relu")["run"]
    job = prepare("digits", tiny(weights=first))
    assert job.config.model == TINY["model"]
    assert isinstance(job.model.stem[1], torch.nn.ReLU)
    assert job.build[1]["act"] == "relu"


def test_training_from_weights_for_the_same_and_for_other_classes(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    weights = str(finished[0])
    config = tiny(model="auto", weights=weights, epochs=1, lr=1e-9, val_fraction=0.0, ema_decay=0.0)
    assert train("digits", config, out=tmp_path / "again")["test_top1"] > 40
    other = three_classes(tmp_path / "three")
    result = train(str(other), config, out=tmp_path / "three-run")
    before, after = load_model(finished[0]).model, load_model(result["run"]).model
    torch.testing.assert_close(after.stem[0].weight, before.stem[0].weight, rtol=0, atol=1e-4)
    assert after.head.weight.shape[0] == 3
    with pytest.raises(RequestError, match=r"belong to another model .*--model auto"):
        train("digits", tiny(model="convmixer_8_2_p1_k3", weights=weights), out=tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["digits", "--epoch", "3"], "did you mean '--epochs'"),
        (["digits", "--epochs", "none"], "epochs must be int"),
        (["digits", "--model", "convmixer_256_9"], "did you mean"),
        (["digits", "--max-time", "soon"], "30m"),
        (["digits", "--device", "cuda"], "no cuda"),
        (["digits", "--recipe", "digit"], "did you mean 'digits'"),
        (["digits", "--auto-augment", "magic"], "auto_augment 'magic'"),
        (["digits", "--mean", "0.1,0.2,0.3"], "must each have 1"),
        (["digits", "--model", "convmixer_8_2_p9_k3"], "does not take images of 8 pixels"),
        (["digits", "--model", "vit_tiny_patch16_224"], "does not take images of 8 pixels"),
        (["digits", "--max-time", "1s"], "max_time 1s is too short"),
        (["--resume", "nowhere"], "not a run folder"),
        (["--resume", "nowhere", "--lr", "0.1"], "leave out --lr"),
        (["digits", "--weights", "nowhere"], "nowhere"),
    ],
)
def test_bad_requests_are_one_line_and_exit_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = [] if "--resume" in arguments else ["--out", str(tmp_path / "run")]
    assert main(["train", *arguments, *out]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_auto_precision_is_that_of_what_computes() -> None:
    convmixer = prepare("digits", Config(**TINY | {"precision": "auto"}))
    sizes = {"dim": 24, "depth": 2, "mixer": "pool", "kernel_size": 3, "patch_size": 1, "img_size": 8}
    other = prepare("digits", Config(**TINY | {"precision": "auto"}), ("isotropic", sizes))
    native = choose_precision("auto", torch.device("cpu"))
    assert convmixer.config.precision == ("bf16" if kernels.available() else native)
    assert other.config.precision == native
