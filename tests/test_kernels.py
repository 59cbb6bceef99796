"""The kernels against float64 references: our error may be at most a small factor above torch's own in that dtype."""

import pytest
import torch

from convmixer.kernels import ops, reference, why_not

DTYPES = (torch.float32, torch.bfloat16)
# (N, C, H, W): whole vectors; a kernel wider than the image and few channels; batch 1; channels off the vector width;
# several images in a group
SHAPES = ((2, 32, 8, 8), (3, 5, 3, 2), (1, 64, 16, 16), (2, 40, 13, 18), (20, 8, 9, 11))


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    if reason := why_not():
        pytest.skip(f"no kernels: {reason}")


def _error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact).abs().max() / exact.abs().max()).item()


def _gradients(function, x, weight, bias, grad) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    y.backward(grad)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def _case(shape: tuple[int, ...], k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(k)
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[1], 1, k, k).to(dtype).float()
    return [x, weight, torch.randn(shape[1]).to(dtype).float(), grad]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 8, 9, 12, 15])
def test_depthwise_is_as_exact_as_torch(k: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x, weight, bias, grad = _case(shape, k, dtype)
        exact = _gradients(reference.depthwise_conv2d, *(t.double() for t in (x, weight, bias, grad)))
        torchs = _gradients(reference.depthwise_conv2d, *(t.to(dtype) for t in (x, weight, bias, grad)))
        ours = _gradients(ops.depthwise_conv2d, x, weight, bias, grad)
        unit = torch.finfo(dtype).eps
        for name, mine, other, true in zip(("y", "x", "weight", "bias"), ours, torchs, exact, strict=True):
            # We add one after the other where torch adds pairwise: the last bits of a sum of hundreds of products.
            # Torch may be exact by luck, so one unit is free.
            allowed = max(8 * _error(other, true), unit)
            assert _error(mine, true) <= allowed, f"{name} {shape} k={k} {dtype}"


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads it of tensors that are no leaves
def test_depthwise_ops_are_well_formed() -> None:
    x, grad = torch.randn(2, 5, 6, 20).requires_grad_(), torch.randn(2, 5, 6, 20)
    weight, bias = torch.randn(20, 1, 4, 4).requires_grad_(), torch.randn(20).requires_grad_()
    torch.library.opcheck(torch.ops.convmixer.depthwise, (x, weight, bias))
    torch.library.opcheck(torch.ops.convmixer.depthwise_input_grad, (grad, weight.detach()))
    torch.library.opcheck(torch.ops.convmixer.depthwise_weight_grad, (x.detach(), grad, 4))
