"""The network as one op: equal to the plain model within rounding, on every kind of build, shape and precision."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from sklearn.datasets import load_digits

from convmixer import kernels, optimize_for_inference
from convmixer.device import choose_precision
from convmixer.errors import RequestError
from convmixer.fast import inference
from convmixer.fast.inference import FastInference, PlainInference
from convmixer.kernels.cpu import build
from convmixer.models.convmixer import ConvMixer

needs_kernels = pytest.mark.skipif(not kernels.available(), reason=f"kernels are not built: {kernels.why_not()}")

_FLAGS = build.processor().split()
needs_vnni = pytest.mark.skipif("avx_vnni" not in _FLAGS, reason="this processor has no AVX-VNNI")

# (dim, depth, k, patch, act, image height and width, batch): odd and even k, a kernel wider than the image, channels
# off the vector width, images that are no multiple of the patch, batches that do and do not fill the threads
SHAPES = [
    (32, 2, 3, 4, "gelu", (32, 32), 2),
    (40, 2, 5, 2, "gelu", (20, 14), 3),
    (40, 3, 8, 2, "relu", (22, 22), 1),
    (64, 2, 7, 4, "relu", (36, 36), 2),
    (17, 2, 9, 2, "gelu", (19, 18), 5),
    (33, 1, 1, 3, "gelu", (33, 33), 1),
    (48, 2, 15, 2, "gelu", (12, 12), 1),
    (48, 2, 2, 2, "gelu", (14, 70), 3),
    (24, 2, 10, 1, "relu", (7, 37), 2),
    (40, 2, 9, 1, "gelu", (50, 33), 3),
    (768, 1, 3, 2, "gelu", (40, 40), 1),  # weights that do not fit into the second-level cache
]


def trained(dim: int, depth: int, k: int, patch: int, act: str, in_chans: int = 3) -> ConvMixer:
    """A seeded network whose BatchNorms have the statistics of its activations, and random weights."""
    torch.manual_seed(0)
    model = ConvMixer(dim, depth, k, patch, in_chans=in_chans, num_classes=7, act=act)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    with torch.no_grad():
        model.train()(torch.randn(8, in_chans, 8 * patch, 8 * patch))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
    return model.eval()


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference, as a share of the spread of the exact logits."""
    return float((got.double() - exact).abs().max() / exact.std())


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32_and_bf16_are_as_exact_as_torch_and_int8_is_close(shape: tuple) -> None:
    *sizes, (height, width), batch = shape
    model = trained(*sizes)
    images = torch.randn(batch, 3, height, width)
    fast = {precision: optimize_for_inference(model, precision)(images) for precision in ("fp32", "bf16")}
    int8 = optimize_for_inference(model, "int8", images)(images)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch_bf16 = model(images)
    with torch.no_grad():
        exact = model.double()(images.double())
    assert error(fast["fp32"], exact) < 2e-5
    assert error(fast["bf16"], exact) < 2 * error(torch_bf16, exact)
    assert error(int8, exact) < 0.03


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_logits(threads: int) -> None:
    fast = optimize_for_inference(trained(40, 2, 5, 2, "gelu"), "bf16")
    images = torch.randn(5, 3, 24, 24)
    before = torch.get_num_threads()
    one = torch.cat([fast(image[None]) for image in images])
    try:
        torch.set_num_threads(threads)
        torch.testing.assert_close(fast(images), one, rtol=1e-5, atol=1e-6)  # the classifier's product differs
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_int8_on_real_images_of_digits() -> None:
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    model = trained(64, 3, 3, 1, "gelu", in_chans=1)
    fast = optimize_for_inference(model, "int8", calibration=images[:64])
    with torch.no_grad():
        exact = model(images[64:264])
    got = fast(images[64:264])
    assert (got.argmax(1) == exact.argmax(1)).float().mean() > 0.97
    assert error(got, exact.double()) < 0.25


@needs_kernels
def test_shapes_may_change_between_calls() -> None:
    """The memory kept between calls contains the zero border of the previous shape."""
    model = trained(32, 2, 5, 2, "gelu")
    fast = optimize_for_inference(model, "fp32")
    for size in ((24, 24), (8, 30), (24, 24), (40, 6)):
        images = torch.randn(3, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_in_one_image_reach_its_logits_and_no_others(precision: str, value: float) -> None:
    images = torch.randn(3, 3, 16, 16)
    fast = optimize_for_inference(trained(32, 2, 3, 2, "gelu"), precision, images.clone())
    images[1, 0, 5, 5] = value
    finite = fast(images).isfinite().all(1)
    assert finite.tolist() == [True, False, True]


@needs_kernels
@pytest.mark.parametrize(
    ("given", "error"),
    [
        (torch.ones(2, 3, 8, 8, dtype=torch.uint8), ValueError),  # pixels that nobody preprocessed
        (torch.ones(2, 3, 8, 8, dtype=torch.complex64), ValueError),
        (torch.ones(2, 4, 8, 8), ValueError),
        (torch.ones(3, 8, 8), ValueError),
        (torch.ones(2, 3, 8, 8).numpy(), TypeError),
        (None, TypeError),
    ],
)
def test_what_are_no_images_is_refused(given: object, error: type[Exception]) -> None:
    optimized = optimize_for_inference(ConvMixer(8, 1, 3, 2, num_classes=5))
    with pytest.raises(error, match=r"images must be \(B, 3, H, W\), preprocessed, not"):
        optimized(given)
    images = torch.ones(2, 3, 8, 8)
    assert torch.equal(optimized(x=images.double()), optimized(images))
    torch.testing.assert_close(optimized.half()(images.half()), optimized(images))


def test_int8_needs_at_least_one_batch() -> None:
    with pytest.raises(RequestError, match="at least one batch"):
        optimize_for_inference(trained(32, 2, 3, 2, "gelu"), "int8", [])


@needs_kernels
def test_a_classifier_without_bias() -> None:
    model = trained(32, 2, 3, 2, "gelu")
    model.head = torch.nn.Linear(32, 5, bias=False)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(optimize_for_inference(model)(images), model(images), rtol=1e-4, atol=1e-5)


def check_the_largest_sums() -> None:
    """All weights and activations at the ends of their ranges, of either sign: no sum may overflow."""
    for sign in (1, -1):
        model = trained(64, 1, 3, 2, "relu")
        with torch.no_grad():
            model.blocks[0][1].weight.fill_(sign * 0.05)
            images = torch.cat([torch.full((1, 3, 12, 12), value) for value in (-3.0, 0.0, 3.0)])
            exact = model(images).double()
        fast = optimize_for_inference(model, "int8", calibration=images)
        assert error(fast(images), exact) < 0.05


@needs_kernels
def test_the_largest_sums_do_not_run_over() -> None:
    check_the_largest_sums()


@needs_kernels
@pytest.mark.parametrize(
    "march",
    [
        "x86-64-v3",
        pytest.param("alderlake", marks=[needs_vnni, pytest.mark.slow]),
        pytest.param("scalar", marks=pytest.mark.slow),
    ],
)
def test_other_builds_agree(march: str, tmp_path: Path) -> None:
    """AVX2, AVX2 with VNNI and plain C++; they do not multiply bf16."""
    code = (
        "import sys, torch, test_fast_inference as t\n"
        "for precision in ('fp32', 'bf16', 'int8'):\n"
        "    model, images = t.trained(40, 2, 5, 2, 'gelu'), torch.randn(3, 3, 20, 14)\n"
        "    fast = t.optimize_for_inference(model, precision, calibration=images)\n"
        "    assert isinstance(fast, t.FastInference)\n"
        "    with torch.no_grad(): exact = model(images).double()\n"
        "    limit = 0.25 if precision == 'int8' else 1e-4\n"
        "    assert t.error(fast(images), exact) < limit, (precision, t.error(fast(images), exact))\n"
        "t.check_the_largest_sums()\n"
    )
    env = os.environ | {"CONVMIXER_KERNELS_MARCH": march, "PYTHONPATH": "src" + os.pathsep + "tests"}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]


@needs_kernels
def test_the_op_is_an_ordinary_one() -> None:
    fast = optimize_for_inference(trained(32, 1, 3, 2, "gelu"), "fp32")
    images = torch.randn(2, 3, 8, 8)
    torch.library.opcheck(torch.ops.convmixer.run_network.default, (images, fast.weights, *fast.sizes, 0, 0))
    parts = (torch.randn(8, 3, 2, 2), torch.randn(6, 8), torch.randn(1, 8, 3, 3), torch.randn(1, 6, 8))
    parts = (*parts, torch.randn(1, 8, 8), torch.randn(1, 6, 8))
    # its size depends on the processor, so that it has no fake kernel: it runs once, and is never traced
    torch.library.opcheck(torch.ops.convmixer.pack_network.default, (*parts, 0), test_utils=("test_schema",))
    exported = torch.export.export(fast, (images,)).module()
    torch.testing.assert_close(exported(images), fast(images))
    with pytest.raises(ValueError, match="images must be"):
        fast(images[0])


def test_what_the_kernel_does_not_know_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    images = torch.randn(2, 3, 8, 8)
    expected = model(images).detach()
    fast = optimize_for_inference(model, "fp32")
    assert isinstance(fast, PlainInference)
    torch.testing.assert_close(fast(images), expected)
    with pytest.raises(RequestError, match="int8 needs"):
        optimize_for_inference(model, "int8", calibration=images)
    with pytest.raises(RequestError, match="precision must be"):
        optimize_for_inference(model, "fp8")


@needs_kernels
def test_int8_wants_images_and_the_model_stays_as_it_is() -> None:
    model = trained(32, 1, 3, 2, "gelu")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RequestError, match="needs images for calibration"):
        optimize_for_inference(model, "int8")
    assert isinstance(optimize_for_inference(model, "int8", calibration=[torch.randn(2, 3, 8, 8)] * 2), FastInference)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(block[1]._forward_pre_hooks for block in model.blocks)


@needs_kernels
@pytest.mark.parametrize("quicker", [True, False])
def test_int8_says_if_it_saves_no_time(
    quicker: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The clock is made, since on one processor int8 is only either."""
    times = {"int8": 1.0 if quicker else 3.0, "fp32": 1.5}
    monkeypatch.setattr(inference, "_seconds", lambda run, images: times[run.precision])
    optimize_for_inference(trained(32, 1, 3, 2, "gelu"), "int8", torch.randn(2, 3, 8, 8))
    said = capfd.readouterr().err
    assert ("int8 is not faster than fp32 here, 0.50 of its speed" in said) is not quicker
    assert quicker or build.level() in said


def test_auto_never_takes_int8() -> None:
    assert choose_precision("auto", torch.device("cpu")) in ("fp32", "bf16")
