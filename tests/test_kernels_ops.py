"""The ops of a block against float64: our error may be at most a small factor above torch's own in that dtype."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convmixer.kernels import ops, why_not

DTYPES = (torch.float32, torch.bfloat16)
# (N, H, W, C): whole vectors; a kernel wider than the image and few channels; batch 1; channels off the vector width;
# several images in a group
SHAPES = ((2, 8, 8, 32), (3, 3, 2, 5), (1, 16, 16, 64), (2, 13, 18, 40), (20, 9, 11, 8))
_kernels = torch.ops.convmixer
_ACTS: dict[int, Callable[[Tensor], Tensor]] = {0: F.gelu, 1: F.relu}


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    if reason := why_not():
        pytest.skip(f"no kernels: {reason}")


class Case:
    """Seeded inputs of all ops for one shape, kernel size, storage dtype and activation."""

    def __init__(self, shape: tuple[int, ...], k: int, dtype: torch.dtype, act: int = 0) -> None:
        C = shape[3]
        torch.manual_seed(k)
        self.act, self.k, self.dtype = act, k, dtype
        self.before, self.u, self.v, self.grad = (torch.randn(shape).to(dtype) for _ in range(4))
        self.norm_before, self.norm, self.back = torch.randn(2, C), torch.randn(2, C), torch.randn(3, C)
        self.depthwise, self.depthwise_bias = torch.randn(C, 1, k, k).to(dtype).float() / k, torch.randn(C)
        self.pointwise, self.pointwise_bias = torch.randn(C, C).to(dtype) / C**0.5, torch.randn(C)

    def args(self, name: str) -> tuple[Any, ...]:
        """Return fresh arguments of an op: some write into them."""
        g, norms = self.grad.clone(), (self.norm, self.before, self.norm_before)
        return {
            "spatial_forward": (self.before, self.norm_before, self.depthwise, self.depthwise_bias, self.act, True),
            "spatial_backward": (g, self.u, self.back, *norms[1:], self.depthwise, self.act),
            "channel_forward": (self.u, *norms, self.pointwise, self.pointwise_bias, self.act, True),
            "channel_backward": (g, self.v, self.back, self.u, *norms, self.pointwise, self.act),
            "act_statistics": (self.v, self.act),
            "act_products": (g, self.v, self.act),
            "act_norm": (self.v, self.norm, self.act),
            "act_norm_pool": (self.v, self.norm, self.act),
            "act_norm_pool_backward": (g[:, 0, 0].float().contiguous(), self.v, self.act),
            "act_norm_backward": (g, self.v, self.back, self.act),
        }[name]


def _ours(name: str, args: tuple[Any, ...]) -> list[Tensor]:
    """Return what an op gives, after the first argument if the op writes into it."""
    out = getattr(_kernels, name)(*args)
    written = [args[0]] if name.endswith("_backward") and name != "act_norm_pool_backward" else []
    return [*written, *(out if isinstance(out, (tuple, list)) else [] if out is None else [out])]


def _norm(v: Tensor, norm: Tensor, act: int) -> Tensor:
    return _ACTS[act](v) * norm[0] + norm[1]


def _norm_backward(grad: Tensor, v: Tensor, back: Tensor, act: int) -> Tensor:
    """(a * grad + b * act(v) + c) * act'(v)."""
    leaf = v.detach().requires_grad_()
    (slope,) = torch.autograd.grad(_ACTS[act](leaf).sum(), leaf)
    return (grad * back[0] + _ACTS[act](v) * back[1] + back[2]) * slope


def _sums(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack((first.sum((0, 1, 2)), (first * second).sum((0, 1, 2))))


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, H, W, C); an even kernel pads one more at the right and the bottom."""
    before, after = (weight.shape[2] - 1) // 2, weight.shape[2] // 2
    padded = F.pad(x.permute(0, 3, 1, 2), (before, after, before, after))
    return F.conv2d(padded, weight, groups=x.shape[3]).permute(0, 2, 3, 1)


def _torchs(name: str, args: tuple[Any, ...]) -> list[Tensor]:
    """Return what the op should give, in plain torch and the arguments' dtype."""
    if name == "spatial_forward":
        before, norm, weight, bias, act, _ = args
        u = _convolve(_norm(before, norm, act), weight) + bias
        return [u, _sums(_ACTS[act](u), _ACTS[act](u))]
    if name == "spatial_backward":
        grad, u, back, before, norm_before, weight, act = args
        du = _norm_backward(grad, u, back, act)
        leaves = [_norm(before, norm_before, act).detach().requires_grad_(), weight.detach().requires_grad_()]
        dx, dw = torch.autograd.grad(_convolve(*leaves), leaves, du)
        return [grad + dx, dw, du.sum((0, 1, 2))[None], _sums(grad + dx, _ACTS[act](before))]
    if name == "channel_forward":
        u, norm, before, norm_before, weight, bias, act, _ = args
        v = (_norm(u, norm, act) + _norm(before, norm_before, act)) @ weight.T + bias
        return [v, _sums(_ACTS[act](v), _ACTS[act](v))]
    if name == "channel_backward":
        grad, v, back, u, norm, before, norm_before, weight, act = args
        dv = _norm_backward(grad, v, back, act)
        h = _norm(u, norm, act) + _norm(before, norm_before, act)
        dw = dv.flatten(0, 2).T @ h.flatten(0, 2)
        return [dv @ weight, dw, dv.sum((0, 1, 2))[None], _sums(dv @ weight, _ACTS[act](u))]
    return _torchs_ends(name, args)


def _torchs_ends(name: str, args: tuple[Any, ...]) -> list[Tensor]:
    act = args[-1]
    if name == "act_statistics":
        return [_sums(_ACTS[act](args[0]), _ACTS[act](args[0]))]
    if name == "act_products":
        return [_sums(args[0], _ACTS[act](args[1]))]
    if name in ("act_norm", "act_norm_pool"):
        y = _norm(*args)
        return [y.mean((1, 2)) if name == "act_norm_pool" else y]
    if name == "act_norm_backward":
        return [_norm_backward(*args)]
    grad, v, act = args  # act_norm_pool_backward
    dy = (grad.to(v.dtype) / (v.shape[1] * v.shape[2]))[:, None, None].expand_as(v)
    return [dy, _sums(dy, _ACTS[act](v))]


def _cast(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in args)


def _error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).abs().max() / exact.abs().max()).item()


def _check(name: str, case: Case, ours: Callable[[str, tuple[Any, ...]], list[Tensor]] = _ours) -> None:
    exact = _torchs(name, _cast(case.args(name), torch.float64))
    torchs = _torchs(name, _cast(case.args(name), case.dtype))
    mine = ours(name, case.args(name))
    assert len(mine) == len(exact)
    for i, (own, other, true) in enumerate(zip(mine, torchs, exact, strict=True)):
        assert own.shape == true.shape
        # We add one after the other where torch adds pairwise: the last bits of a sum of hundreds of products.
        # Torch may be exact by luck, so a few units are free.
        free = 1e-6 if case.dtype is torch.float32 else 2 * torch.finfo(case.dtype).eps
        allowed = max(8 * _error(other, true), free)
        assert _error(own, true) <= allowed, f"{name}, result {i}, {tuple(case.u.shape)}, k={case.k}, {case.dtype}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 8, 9, 12, 15])
@pytest.mark.parametrize("name", ["spatial_forward", "spatial_backward"])
def test_the_spatial_half_is_as_exact_as_torch(name: str, k: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        _check(name, Case(shape, k, dtype, act=k % 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", [0, 1])
@pytest.mark.parametrize("name", ["channel_forward", "channel_backward"])
def test_the_pointwise_half_is_as_exact_as_torch(name: str, act: int, dtype: torch.dtype) -> None:
    # one row; more rows than a block, and odd; more than are added to the weights' gradient at once; a wide layer
    for shape in (*SHAPES, (1, 1, 1, 3), (2, 9, 31, 132), (3, 17, 23, 48), (1, 3, 5, 520)):
        _check(name, Case(shape, 1, dtype, act))


ENDS = ("act_statistics", "act_products", "act_norm", "act_norm_pool", "act_norm_pool_backward", "act_norm_backward")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", [0, 1])
@pytest.mark.parametrize("name", ENDS)
def test_the_ends_are_as_exact_as_torch(name: str, act: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        _check(name, Case(shape, 1, dtype, act))


HALVES = ("spatial_forward", "spatial_backward", "channel_forward", "channel_backward")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HALVES)
def test_threads_change_no_more_than_the_order_of_sums(name: str, dtype: torch.dtype) -> None:
    case, before = Case((5, 9, 11, 40), 4, dtype), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_ours(name, case.args(name)))
            assert all(torch.equal(a, b) for a, b in zip(results[-1], _ours(name, case.args(name)), strict=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        for a, b in zip(other, results[0], strict=True):
            assert _error(a, b.double()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", HALVES)
def test_strided_activations_are_refused(name: str) -> None:
    args = list(Case((2, 6, 7, 16), 3, torch.float32).args(name))
    args[0] = args[0].transpose(1, 2)
    with pytest.raises(RuntimeError, match="contiguous"):
        getattr(_kernels, name)(*args)


@pytest.mark.parametrize("name", [*HALVES, "act_products", "act_norm_backward", "act_norm_pool_backward"])
def test_tensors_that_do_not_fit_are_refused(name: str) -> None:
    """A kernel reads memory by the sizes of one tensor: the others must have them."""
    args = Case((2, 6, 7, 16), 3, torch.float32).args(name)
    smaller = Case((2, 6, 7, 8), 3, torch.float32).args(name)
    for i, (own, other) in enumerate(zip(args, smaller, strict=True)):
        if isinstance(own, Tensor):
            with pytest.raises(RuntimeError, match="must be"):
                getattr(_kernels, name)(*args[:i], other, *args[i + 1 :])


def _without_the_last_row(values: list[Tensor]) -> list[Tensor]:
    values[0][:, -1] = 0
    return values


def _without_the_last_channel(values: list[Tensor]) -> list[Tensor]:
    values[0][..., -1] = 0
    return values


def _with_smaller_sums(values: list[Tensor]) -> list[Tensor]:
    values[1] = values[1] * 0.8
    return values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [_without_the_last_row, _without_the_last_channel, _with_smaller_sums])
@pytest.mark.parametrize("name", HALVES)
def test_a_wrong_kernel_fails(name: str, wrong: Callable[[list[Tensor]], list[Tensor]], dtype: torch.dtype) -> None:
    case = Case((3, 9, 11, 40), 5, dtype)
    with pytest.raises(AssertionError, match=name):
        _check(name, case, lambda op, args: wrong(_ours(op, args)))


def test_a_flipped_kernel_fails() -> None:
    def flipped(op: str, args: tuple[Any, ...]) -> list[Tensor]:
        return _ours(op, (*args[:2], args[2].flip(2), *args[3:]))

    with pytest.raises(AssertionError, match="spatial_forward"):
        _check("spatial_forward", Case((2, 9, 11, 8), 3, torch.float32), flipped)


@pytest.mark.parametrize("name", [*HALVES, *ENDS])
def test_every_op_is_well_formed(name: str) -> None:
    torch.library.opcheck(getattr(_kernels, name), Case((2, 5, 6, 20), 4, torch.float32).args(name))


def test_every_op_is_tested_here_or_with_the_models() -> None:
    names = {schema.partition("(")[0] for schema in ops.SCHEMAS}
    assert names == {*HALVES, *ENDS, "blocks", "blocks_backward"}
