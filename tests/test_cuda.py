"""The CUDA path, if there is a GPU: precision, training, a stopped run, evaluation, the results of probe and plan."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from convmixer import records
from convmixer.config import Config
from convmixer.device import choose_device
from convmixer.inference import load_classifier, torch_logits
from convmixer.models.create import create_model
from convmixer.studies.probe import probe
from convmixer.studies.verify import verify
from convmixer.train.plan import plan
from convmixer.train.run import resume, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

TINY = {"model": "convmixer_32_2_p1_k3", "lr": 0.03, "batch_size": 64, "device": "cuda", "workers": 1, "epochs": 3}


def tiny(**more: object) -> Config:
    return Config(**{**TINY, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["convmixer_64_4_p2_k5", "convmixer_48_2_p1_k4"])
def test_fp32_is_fp32(name: str) -> None:
    """TF32 in the convolutions would differ by about 1e-3."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=10).eval()
    images = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32)
    expected = torch_logits(model.double(), torch.device("cpu"), "fp32")(images.astype(np.float64))
    found = torch_logits(model.float(), choose_device("cuda"), "fp32")(images)
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_ends_with_a_number_that_holds(tmp_path: Path, precision: str) -> None:
    result = train(
        "digits", tiny(precision=precision, epochs=6, ema_decay=0.5, mixup=0.1, cutmix=0.1), tmp_path / "run"
    )
    assert result["test_top1"] > 40
    record = records.read(tmp_path / "run" / "record.jsonl")[-1]
    assert (record.results["device"], record.results["precision"]) == ("cuda", precision)
    assert record.environment["gpus"][0] == torch.cuda.get_device_name(0)
    assert verify(tmp_path / "run" / "record.jsonl")["holds"]
    weights = tmp_path / "run" / "weights" / "best"
    samples = sorted((tmp_path / "run" / "samples").iterdir())
    batch = np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32)
    assert samples
    on_gpu, on_cpu = (load_classifier(weights, "fp32", device).logits(batch) for device in ("cuda", "cpu"))
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-3, atol=1e-4)


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = [f"--{key.replace('_', '-')}={value}" for key, value in (TINY | {"epochs": 30}).items()]
    command = [sys.executable, "-m", "convmixer", "train", "digits", "--out", str(out), *settings]
    running = subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    deadline = time.monotonic() + 120
    while not (out / "metrics.csv").exists() or len((out / "metrics.csv").read_text().splitlines()) < 3:
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 143
    assert not (out / "record.jsonl").exists()
    assert resume(out)["epochs"] == 30
    lines = (out / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [f"{epoch}.0" for epoch in range(1, 31)]


def test_plan_and_probe_count_the_memory_of_the_gpu() -> None:
    planned = plan("digits", tiny())
    probed = probe("digits", tiny(), ("convmixer_32_2_p1_k3", {}))
    for found in (planned, probed):
        assert found["device"] == "cuda"
        assert 2**20 < found["peak_memory_bytes"] < 2**30
    assert probed["train_images_per_second"] > 0
