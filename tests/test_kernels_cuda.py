"""The CUDA kernels against float64, without a GPU: Triton's interpreter runs them on CPU tensors.

The interpreter has to be chosen before Triton is imported, so the tests of this file run in a separate process, which
`test_in_the_interpreter` starts.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from convmixer import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_the_interpreter")
pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and Inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = ((torch.float32, 0), (torch.float32, 1), (torch.bfloat16, 0), (torch.float16, 0), (torch.bfloat16, 1))
# (N, H, W, C): batch 1 and an image smaller than most kernels; widths off the block
SHAPE, ODD = (2, 5, 4, 8), (1, 3, 5, 35)


# each op in fp32 and bf16, whole models in fp32, and that a wrong kernel fails
QUICK = "gradients[4] or (half and shape1 and (dtype0 or dtype2)) or ends[dtype0 or 12-3-gelu or a_wrong_kernel"


@pytest.mark.skipif(INTERPRETED, reason="is that process")
@pytest.mark.parametrize("only", [QUICK, pytest.param("", marks=pytest.mark.slow)], ids=["quick", "all"])
def test_in_the_interpreter(only: str) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", only, __file__]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "[100%]" in done.stdout


@pytest.fixture(autouse=INTERPRETED)
def _round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts off the bits that a bf16 lacks; GPUs round to the nearest."""
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def convert(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if str(source) == "fp32" and str(target) == "bf16":
            return torch.tensor(x).bfloat16().view(torch.uint16).numpy()
        return cut(x, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def _ops() -> dict[str, Callable[..., Any]]:
    from convmixer.kernels.cuda.ops import IMPLEMENTATIONS

    return IMPLEMENTATIONS


def _error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-12)).item()


def _check(ours: Any, exact: Any, dtype: torch.dtype, units: float = 4) -> None:
    """Allow a few roundings of the storage dtype in the norm of a tensor."""
    for i, (mine, true) in enumerate(zip(ours, exact, strict=True)):
        assert mine.shape == true.shape
        assert _error(mine, true) <= units * torch.finfo(dtype).eps, i


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _act(v: Tensor, act: int) -> Tensor:
    return F.relu(v) if act else F.gelu(v)


def _norm(v: Tensor, norm: Tensor, act: int) -> Tensor:
    return _act(v, act) * norm[0] + norm[1]


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    before, after = (weight.shape[2] - 1) // 2, weight.shape[2] // 2
    padded = F.pad(x.permute(0, 3, 1, 2), (before, after, before, after))
    return F.conv2d(padded, weight, bias, groups=x.shape[3]).permute(0, 2, 3, 1)


def _sums(g: Tensor, a: Tensor) -> Tensor:
    return torch.stack((g.sum((0, 1, 2)), (g * a).sum((0, 1, 2))))


@interpreted
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 9, 15])
def test_depthwise_and_its_gradients(k: int) -> None:
    """Taps one to the side must not pass."""
    from convmixer.kernels.cuda import depthwise, sums

    shape = ODD if k % 2 else SHAPE
    x, grad = _random(shape, torch.float32, 0), _random(shape, torch.float32, 1)
    weight, bias = _random((shape[3], 1, k, k), torch.float32, 2), _random((shape[3],), torch.float32, 3)
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    exact = _convolution(leaves[0], leaves[1], bias.double())
    exact.backward(grad.double())
    taps, nothing = depthwise.taps_of(weight), torch.zeros(shape)
    ours = (
        depthwise.forward(x, taps, bias, 1)[0],
        depthwise.input_gradient(grad, nothing, nothing, taps, 1)[0],
        sums.total(depthwise.weight_gradient(x, grad, k)).view_as(weight),
    )
    _check(ours, (exact.detach(), *(leaf.grad for leaf in leaves)), torch.float32, units=8)
    if k > 1:
        shifted = depthwise.forward(x, depthwise.taps_of(weight.roll(1, dims=3)), bias, 1)[0]
        assert _error(shifted, exact.detach()) > 0.01


@interpreted
@pytest.mark.parametrize(("dtype", "act"), CASES)
@pytest.mark.parametrize(("shape", "k"), [(SHAPE, 4), (ODD, 5)])
def test_spatial_half(shape: tuple[int, ...], k: int, dtype: torch.dtype, act: int) -> None:
    C, ops = shape[3], _ops()
    before, u, grad = (_random(shape, dtype, seed) for seed in range(3))
    norm, back = _random((2, C), torch.float32, 3), _random((3, C), torch.float32, 4)
    weight, bias = _random((C, 1, k, k), torch.float32, 5) / k, _random((C,), torch.float32, 6)
    ours, sums = ops["spatial_forward"](before, norm, weight, bias, act, True)
    wide = [t.double() for t in (before, norm, weight, bias)]
    leaves = [wide[2].requires_grad_(), _norm(wide[0], wide[1], act).requires_grad_()]
    exact = _convolution(leaves[1], leaves[0], wide[3])
    a = _act(ours.double(), act)  # the statistics are of what was stored
    _check((ours,), (exact.detach(),), dtype)
    _check((sums[1],), ((a * a).sum((0, 1, 2)),), dtype)
    leaf = u.double().requires_grad_()
    _act(leaf, act).sum().backward()
    du = (grad.double() * back[0] + _act(u.double(), act) * back[1] + back[2]) * leaf.grad
    exact.backward(du)
    dx = grad.double() + leaves[1].grad
    mine = grad.clone()
    weight_grad, bias_grad, sums = ops["spatial_backward"](mine, u, back, before, norm, weight, act)
    expected = dx, leaves[0].grad, du.sum((0, 1, 2))[None]
    _check((mine, weight_grad, bias_grad), expected, dtype, units=8)
    _check((sums,), (_sums(mine.double(), _act(before.double(), act)),), dtype)


@interpreted
@pytest.mark.parametrize(("dtype", "act"), CASES)
@pytest.mark.parametrize("shape", [SHAPE, ODD, (1, 3, 11, 260)])
def test_channel_half(shape: tuple[int, ...], dtype: torch.dtype, act: int) -> None:
    """260 channels are more than one program takes at once."""
    C, ops = shape[3], _ops()
    before, u, v, grad = (_random(shape, dtype, seed) for seed in range(4))
    norm, norm_before = _random((2, C), torch.float32, 4), _random((2, C), torch.float32, 5)
    back, bias = _random((3, C), torch.float32, 6), _random((C,), torch.float32, 7)
    matrix = (_random((C, C), torch.float32, 8) / C**0.5).to(dtype)
    ours, sums = ops["channel_forward"](u, norm, before, norm_before, matrix, bias, act, True)
    wide = [t.double() for t in (u, norm, before, norm_before)]
    h = (_norm(*wide[:2], act) + _norm(*wide[2:], act)).requires_grad_()
    weight = matrix.double().requires_grad_()
    exact = h @ weight.t() + bias.double()
    a = _act(ours.double(), act)
    _check((ours,), (exact.detach(),), dtype)
    _check((sums[0], sums[1]), (a.sum((0, 1, 2)), (a * a).sum((0, 1, 2))), dtype)
    leaf = v.double().requires_grad_()
    _act(leaf, act).sum().backward()
    dv = (grad.double() * back[0] + _act(v.double(), act) * back[1] + back[2]) * leaf.grad
    exact.backward(dv)
    mine = grad.clone()
    weight_grad, bias_grad, sums = ops["channel_backward"](mine, v, back, u, norm, before, norm_before, matrix, act)
    _check((mine, weight_grad, bias_grad), (h.grad, weight.grad, dv.sum((0, 1, 2))[None]), dtype, units=8)
    _check((sums,), (_sums(mine.double(), _act(u.double(), act)),), dtype)


@interpreted
@pytest.mark.parametrize(("dtype", "act"), CASES)
def test_ends(dtype: torch.dtype, act: int) -> None:
    ops, shape = _ops(), ODD
    v, grad, norm = _random(shape, dtype, 0), _random(shape, dtype, 1), _random((2, shape[3]), torch.float32, 2)
    wide, a, g = v.double(), _act(v.double(), act), grad.double()
    _check(ops["act_statistics"](v, act), (a.sum((0, 1, 2)), (a * a).sum((0, 1, 2))), dtype)
    _check(ops["act_products"](grad, v, act), _sums(g, a), dtype)
    _check((ops["act_norm"](v, norm, act),), (_norm(wide, norm, act),), dtype)
    _check((ops["act_norm_pool"](v, norm, act),), (_norm(wide, norm, act).mean((1, 2)),), dtype)
    pooled = _random((shape[0], shape[3]), torch.float32, 3)
    spread, sums = ops["act_norm_pool_backward"](pooled, v, act)
    share = (pooled.double() / (shape[1] * shape[2]))[:, None, None].expand(shape)
    _check((spread, *sums), (share, *_sums(share, a)), dtype)


@interpreted
def test_only_polynomials_of_bf16_differ_from_the_formula() -> None:
    """Within 2e-4, a tenth of a bf16's rounding near 1; and exact GELU is as exact as torch's."""
    v = torch.linspace(-8, 8, 2048, dtype=torch.float64).view(1, 1, 1, -1)  # a mean over one pixel is in fp32
    identity = torch.stack((torch.ones(2048), torch.zeros(2048)))
    for dtype, allowed in ((torch.float32, 2e-6), (torch.float16, 2e-6), (torch.bfloat16, 2.1e-4)):
        stored = v.to(dtype)
        away = _ops()["act_norm_pool"](stored, identity, 0) - F.gelu(stored.double()).flatten(1)
        assert away.abs().max() < allowed, dtype


def _model(dim: int, kernel_size: int, act: str, depth: int = 2) -> nn.Module:
    from convmixer.models.convmixer import ConvMixer

    torch.manual_seed(0)
    model = ConvMixer(dim, depth, kernel_size, patch_size=2, num_classes=5, act=act)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return model


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], nn.Module]:
    """Return `accelerate` with the CUDA kernels behind the ops of CPU tensors."""
    from convmixer import fast
    from convmixer.fast import support, training

    assert kernels.cuda._load("CPU") is None
    for module in (support, training):
        monkeypatch.setattr(module, "why_not", lambda device, dtype: None)
    return fast.accelerate


def _pass(model: nn.Module, images: Tensor, dtype: torch.dtype) -> list[Tensor]:
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        logits = model(images)
        loss = F.cross_entropy(logits.to(images.dtype), torch.arange(len(images)) % 5)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    return [logits.detach(), images.grad, *gradients, *(b.clone().float() for b in model.buffers())]


@interpreted
@pytest.mark.parametrize(
    ("dim", "kernel_size", "act", "dtype", "training"),
    [
        (12, 3, "gelu", torch.float32, True),
        (8, 2, "relu", torch.float32, False),
        (8, 2, "gelu", torch.bfloat16, True),
        (12, 3, "relu", torch.bfloat16, False),
        (8, 3, "relu", torch.float16, True),
    ],
)
def test_whole_models_are_as_exact_as_torch(
    swapped: Any, dim: int, kernel_size: int, act: str, dtype: torch.dtype, training: bool
) -> None:
    plain = _model(dim, kernel_size, act).train(training)
    fast = swapped(copy.deepcopy(plain))
    images = _random((3, 3, 7, 8), torch.float32, 1)
    names = ["logits", "images", *dict(plain.named_parameters()), *dict(plain.named_buffers())]
    exact = _pass(copy.deepcopy(plain).double(), images.double(), torch.float64)
    torchs, ours = _pass(plain, images, dtype), _pass(fast, images, dtype)
    for name, mine, other, true in zip(names, ours, torchs, exact, strict=True):
        allowed = max(3 * _error(other, true), torch.finfo(dtype).eps * 8)
        assert _error(mine, true) <= allowed, name


@interpreted
@pytest.mark.parametrize("training", [True, False])
def test_features_of_blocks_are_as_exact_as_torch(swapped: Any, training: bool) -> None:
    plain = _model(8, 3, "gelu").train(training)
    fast, images = swapped(copy.deepcopy(plain)), _random((2, 3, 8, 8), torch.float32, 1)
    seen = []
    for model in (plain, fast):
        last, taken = model.forward_intermediates(images, [0])
        # random weights, since a norm keeps the mean square, whose gradient is all rounding
        sum((features * _random(features.shape, torch.float32, 2)).sum() for features in (last, *taken)).backward()
        seen.append([last, *taken, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()])
    assert len(seen[0]) == len(seen[1])
    for mine, other in zip(seen[1], seen[0], strict=True):
        assert _error(mine, other.double()) < 1e-4
    with torch.no_grad():
        ours, others = (model.eval().forward_intermediates(images)[1] for model in (fast, plain))
    assert all(_error(mine, other.double()) < 1e-5 for mine, other in zip(ours, others, strict=True))


@interpreted
def test_inference_is_as_exact_as_torch(swapped: Any) -> None:
    """Without gradients a half of a block is one launch."""
    plain = _model(12, 3, "gelu").eval()
    fast, images = swapped(copy.deepcopy(plain)), _random((2, 3, 9, 12), torch.float32, 1)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(images.double())
        assert _error(fast(images), exact) < max(3 * _error(plain(images), exact), 1e-6)
        features = fast.forward_features(images)
        assert _error(features, copy.deepcopy(plain).double().forward_features(images.double())) < 1e-6


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_optimized_model_is_as_exact_as_torch(dtype: torch.dtype) -> None:
    from convmixer.fast.cuda import CudaInference

    plain: Any = _model(12, 3, "gelu").eval()
    images = _random((2, 3, 9, 12), torch.float32, 1)
    exact = copy.deepcopy(plain).double()(images.double())
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        allowed = max(3 * _error(plain(images), exact), 4 * torch.finfo(dtype).eps)
    assert _error(CudaInference(plain, dtype)(images), exact) < allowed
    with pytest.raises(ValueError, match="smaller than a patch"):
        CudaInference(plain, dtype)(images[:, :, :1])


@interpreted
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_nan_and_inf_pass_through(swapped: Any, dtype: torch.dtype, value: float) -> None:
    plain = _model(8, 3, "gelu").eval()
    fast, images = swapped(copy.deepcopy(plain)), _random((2, 3, 12, 12), torch.float32, 1)
    images[0, 0, 4, 4] = value
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            expected, found = plain.forward_features(images), fast.forward_features(images)
        assert torch.equal(expected.isfinite(), found.isfinite())
        assert torch.equal(expected.isnan(), found.isnan())
    if value != value:
        slopes = images.bfloat16().permute(0, 2, 3, 1).contiguous()
        grad, back = torch.ones_like(slopes), torch.ones(3, 3)
        _ops()["act_norm_backward"](grad, slopes, back, 0)
        assert torch.equal(grad.isnan(), slopes.isnan())


@interpreted
def test_repeats_are_equal_in_every_bit(swapped: Any) -> None:
    fast, images = swapped(_model(8, 3, "gelu")), _random((3, 3, 8, 8), torch.float32, 1)
    first, second = (_pass(copy.deepcopy(fast), images, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted
def test_an_empty_batch_gives_no_logits(swapped: Any) -> None:
    assert swapped(_model(8, 3, "gelu")).eval()(torch.empty(0, 3, 12, 12)).shape == (0, 5)


@interpreted
@pytest.mark.parametrize("broken", ["_convolve_kernel", "_weight_gradient"])
def test_a_wrong_kernel_fails(swapped: Any, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """A kernel that computes something else must not pass the comparison above."""
    from convmixer.kernels.cuda import depthwise

    kernel = getattr(depthwise, broken)

    class Wrong:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def run(first: Tensor, second: Tensor, *args: Any, **kwargs: Any) -> None:
                kernel[grid](first * 1.05, second, *args, **kwargs)

            return run

    monkeypatch.setattr(depthwise, broken, Wrong())
    with pytest.raises(AssertionError):
        test_whole_models_are_as_exact_as_torch(swapped, 12, 3, "gelu", torch.float32, True)
