"""The CUDA kernels on a GPU: whole models against float64, no wait in a step, the same bits each time."""

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from convmixer.device import choose_device
from convmixer.fast import accelerate, optimize_for_inference
from convmixer.fast.training import FastConvMixer
from convmixer.models.convmixer import ConvMixer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def _model(dim: int, kernel_size: int, act: str = "gelu") -> ConvMixer:
    choose_device("cuda")
    torch.manual_seed(0)
    model = ConvMixer(dim, 2, kernel_size, patch_size=2, num_classes=7, act=act)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return model


def _images(batch: int = 6, size: tuple[int, int] = (35, 44)) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def _pass(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    images = images.clone().requires_grad_()
    with torch.autocast("cuda", dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        logits = model(images)
        loss = F.cross_entropy(logits.to(images.dtype), torch.arange(len(images), device=images.device) % 7)
    loss.backward()
    gradients: list[Any] = [p.grad for p in model.parameters()]
    found = [logits.detach(), images.grad, *gradients, *(b.clone() for b in model.buffers())]
    return [t.double().cpu() for t in found]


def _error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value - exact).norm() / exact.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("dim", "kernel_size", "act"),
    [(44, 5, "gelu"), (256, 9, "gelu"), (264, 8, "relu"), (384, 15, "gelu"), (8, 1, "relu")],
)
def test_gradients_are_as_exact_as_torch(
    dim: int, kernel_size: int, act: str, dtype: torch.dtype, training: bool
) -> None:
    plain = _model(dim, kernel_size, act).train(training)
    exact = _pass(copy.deepcopy(plain).double().cuda(), _images().double().cuda(), torch.float64)
    plain.cuda()
    fast = accelerate(copy.deepcopy(plain))
    assert type(fast) is FastConvMixer
    torchs, ours = _pass(plain, _images().cuda(), dtype), _pass(fast, _images().cuda(), dtype)
    names = ["logits", "images", *dict(plain.named_parameters()), *dict(plain.named_buffers())]
    for name, mine, other, true in zip(names, ours, torchs, exact, strict=True):
        assert _error(mine, true) <= max(4 * _error(other, true), 16 * torch.finfo(dtype).eps), name


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_inference_replays_what_it_computes(precision: str) -> None:
    plain = _model(256, 7).eval()
    exact = copy.deepcopy(plain).double()(_images().double())
    fast = optimize_for_inference(plain.cuda(), precision)
    with torch.no_grad():
        for _ in range(3):  # the first captures
            for batch in (6, 1):
                logits = fast(_images()[:batch].cuda()).double().cpu()
                assert _error(logits, exact[:batch]) < (1e-5 if precision == "fp32" else 0.03)


def test_repeats_are_equal_in_every_bit() -> None:
    fast = accelerate(_model(256, 5).cuda())
    first, second = (_pass(copy.deepcopy(fast), _images(32).cuda(), torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_step_never_waits() -> None:
    from convmixer.config import Config
    from convmixer.train.module import TrainingModule

    module = TrainingModule(
        accelerate(_model(64, 5).cuda()), Config(precision="bf16"), num_classes=7, steps_per_epoch=4, epochs=1
    )
    images, targets = _images(8).cuda(), F.one_hot(torch.arange(8).cuda() % 7, 7).float()
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
    module._take_step(images, targets)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module._take_step(images, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
