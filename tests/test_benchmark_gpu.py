"""The GPU benchmark, tried on the CPU, and the bound that it compares with."""

import time

import pytest
import torch

from convmixer.benchmark import gpu
from convmixer.benchmark.case import Case
from convmixer.benchmark.gpu import benchmark_gpu, bound, contenders
from convmixer.errors import RequestError

SMALL = {"dim": 8, "depth": 2, "kernel_size": 3, "patch_size": 2, "img_size": 8, "num_classes": 4, "threads": 1}


def _case(task: str, **more: object) -> Case:
    return Case(**(SMALL | {"task": task, "batch_size": 4, "precision": "bf16"} | more))  # type: ignore[arg-type]


def test_the_bound_is_that_of_the_paper_sizes() -> None:
    """With an H100's rates, see docs/log.md: 256/8 is bound by copies, 1536/20 by matrix multiplications."""
    rates = {"copied_bytes_per_second": 3.0e12, "products_per_second": 700e12}
    sizes = {"kernel_size": 9, "num_classes": 10}
    small = _case("train", **sizes, dim=256, depth=8, patch_size=2, img_size=32)
    large = _case("train", **sizes, dim=1536, depth=20, patch_size=7, img_size=224)
    assert bound(small, rates) == pytest.approx(204_000, rel=0.01)
    assert bound(large, rates) == pytest.approx(2_400, rel=0.01)


@pytest.mark.parametrize("task", ["train", "infer"])
def test_ours_and_a_peer_are_measured(task: str) -> None:
    result = benchmark_gpu(_case(task), ["eager-bf16-nhwc"], rounds=2, sample_seconds=0.01, device_name="cpu")
    assert result["best_peer"] == "eager-bf16-nhwc"
    assert result["ours"]["min"] <= result["ours"]["images_per_second"] <= result["ours"]["max"]
    assert result["ratio"] > 0
    assert not result["missing"]


def test_peers_are_eager_in_both_layouts_and_compiled() -> None:
    names = set(contenders(_case("train")))
    eager = {f"eager-{p}-{layout}" for p in ("bf16", "fp32") for layout in ("nchw", "nhwc")}
    compiled = {f"compile-{mode}-bf16" for mode in ("default", "reduce-overhead", "max-autotune")}
    assert names == eager | compiled | {"ours"}


def test_without_rounds_contenders_are_only_prepared() -> None:
    assert benchmark_gpu(_case("train"), ["eager-bf16-nchw"], rounds=0, device_name="cpu") == {"missing": {}}


def test_a_peer_that_takes_too_long_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_peer", lambda *_: lambda device: time.sleep(9))
    result = benchmark_gpu(
        _case("train"), ["eager-bf16-nchw"], rounds=1, sample_seconds=0.01, device_name="cpu", compile_limit=1
    )
    assert "after 1 s" in result["missing"]["eager-bf16-nchw"]
    assert result["best_peer"] is None


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(RequestError, match="no such peers"):
        benchmark_gpu(_case("train"), ["tpu"], device_name="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(RequestError, match="no cuda device"):
        benchmark_gpu(_case("train"))
