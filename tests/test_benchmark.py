"""The benchmark: what it measures, in which order, and that it reports what it could not measure."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import Command
from convmixer import records
from convmixer.benchmark import measure
from convmixer.benchmark.case import Case, build, case_of
from convmixer.benchmark.contenders import peers
from convmixer.benchmark.fared import fared
from convmixer.cli import main
from convmixer.errors import RequestError
from convmixer.kernels import why_not

TINY = Case("infer", 16, 2, 3, 4, 16, 5, 2, "fp32", 1)


def test_sizes_by_hand_are_put_over_the_models() -> None:
    case = case_of("train", "convmixer_768_32", {"img_size": 64, "depth": None}, precision="bf16", threads=2)
    assert (case.dim, case.depth, case.act, case.img_size, case.batch_size) == (768, 32, "relu", 64, 64)
    assert case_of("infer", None, {"dim": 8, "depth": 1}, precision="int8", threads=1).model == "convmixer_8_1_p7_k9"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no process to cores")
def test_threads_are_those_of_the_cores_that_may_be_used() -> None:
    case = "case_of('infer', 'convmixer_768_32', {}, precision='fp32')"
    code = f"from convmixer.benchmark.case import case_of; print({case}.threads)"
    command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"


@pytest.mark.parametrize(
    ("task", "model", "sizes", "precision", "message"),
    [
        ("train", None, {"dim": 8}, "bf16", "depth missing"),
        ("train", "resnet18", {}, "bf16", "measures ConvMixers only"),
        ("train", "convmixer_256_8", {}, "int8", "no precision 'int8'"),
        ("infer", "convmixer_256_8_p4_k5", {"img_size": 3}, "bf16", "smaller than the patch size 4"),
    ],
)
def test_a_wrong_request_is_named(
    task: str, model: str | None, sizes: dict[str, Any], precision: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        case_of(task, model, sizes, precision=precision, threads=1)


@pytest.mark.parametrize("native", [True, False])
def test_the_bound_is_in_what_the_processor_multiplies(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "native_bf16", lambda: native)
    bound = measure.gemm_steps(dataclasses.replace(TINY, precision="bf16"))
    assert set(bound) == ({"gemm-mm"} if native else {"gemm-mm", "gemm-conv"})


def test_contenders_take_turns() -> None:
    turns: list[str] = []
    steps = {name: (lambda name=name: (turns.append(name), time.sleep(0.001))) for name in "ab"}
    times = measure.interleave(steps, rounds=3, sample_seconds=0.0)
    assert "".join(turns[2:]) == "aabb" * 3  # after finding the counts: one step untimed, one timed
    assert all(len(t) == 3 and min(t) >= 0.001 for t in times.values())


def test_the_network_keeps_its_activations_ordinary() -> None:
    model = build(TINY).eval()
    features = model.forward_features(torch.randn(8, 3, 16, 16))
    assert 0.5 < features.detach().std().item() < 2


@pytest.mark.parametrize("task", ["train", "infer"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_bound_runs_all_pointwise_products(task: str, precision: str) -> None:
    if task == "train" and precision == "int8":
        return
    case = Case(task, 16, 2, 3, 4, 16, 5, 2, precision, 1)
    times = measure.interleave(measure.gemm_steps(case), rounds=1, sample_seconds=0.0)
    assert all(t[0] > 0 for t in times.values())


def test_every_precision_has_peers() -> None:
    names = [c.name for c in peers("infer", "fp32")]
    assert {"eager-fp32-nhwc", "compile-freezing-fp32", "onnxruntime-fp32", "openvino-fp32"} <= set(names)
    assert "compile-bf16" in [c.name for c in peers("train", "bf16")]
    assert [c.name for c in peers("infer", "int8")] == ["onnxruntime-int8", "openvino-int8"]


@pytest.mark.skipif(not measure.can_measure_memory(), reason="peak memory is measured on Linux alone")
def test_peak_memory_is_what_a_step_saves_and_little_more() -> None:
    peak = measure.peak_memory(Case("train", 64, 4, 3, 2, 32, 5, 64, "fp32", 1), "eager-fp32-nchw")
    saved = (4 * 2 + 1) * 3 * (64 * 64 * 16 * 16) * 4  # input, activation and its input, of every BatchNorm there is
    assert saved < peak < 3 * saved


def test_it_refuses_to_start_without_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CONVMIXER_KERNELS", "0")
    assert main(["benchmark", "train", "--model", "convmixer_256_8"]) == 2
    assert "CONVMIXER_KERNELS" in capsys.readouterr().err


@pytest.mark.skipif(bool(why_not()), reason=f"kernels are not built: {why_not()}")
def test_command_measures_names_what_is_left_out_and_keeps_a_record(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    shape = ["--dim", "16", "--depth", "2", "--patch-size", "4", "--kernel-size", "3", "--img-size", "16"]
    quick = ["--rounds", "1", "--sample-seconds", "0", "--no-memory", "--threads", "1"]
    words = ["--peers", "eager-bf16-nchw", "--json", "--record", str(file)]
    said = Command("benchmark", "train", *shape, *quick, *words).finish()
    result = json.loads(said.splitlines()[-1])
    assert result["best_peer"] == "eager-bf16-nchw"
    assert result["ratio"] == pytest.approx(
        result["ours"]["images_per_second"] / result["peers"]["eager-bf16-nchw"]["images_per_second"]
    )
    assert result["left_out"]["compile-bf16"] == "not selected"
    assert "compile-bf16                 not measured: not selected" in said
    assert records.read(file)[0].results["share_of_bound"] == result["share_of_bound"] > 0
    line = next(line for line in fared() if line.startswith("train convmixer_16_2_p4_k3, batch 64, bf16"))
    assert f"{result['ratio']:.2f} times eager-bf16-nchw" in line
