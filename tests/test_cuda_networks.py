"""The networks of the benchmark on a GPU, at its sizes: values and gradients against float64."""

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from convmixer.device import choose_device
from convmixer.fast import accelerate, optimize_for_inference
from convmixer.models.convmixer import ConvMixer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
# dim, kernel size, patch size, image side, batch; two blocks of each
NETWORKS = {
    "256/8 p2 k5": (256, 5, 2, 32, 512),
    "256/8 p1 k9": (256, 9, 1, 32, 256),
    "768/32": (768, 7, 7, 224, 64),
    "1536/20": (1536, 9, 7, 224, 64),
}
TENSORS = 30  # of a block's size, in float64, that a pass holds


def _model(name: str) -> tuple[ConvMixer, torch.Tensor]:
    dim, kernel_size, patch_size, side, batch = NETWORKS[name]
    choose_device("cuda")
    needed = TENSORS * 8 * batch * (side // patch_size) ** 2 * dim
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    torch.manual_seed(0)
    model = ConvMixer(dim, 2, kernel_size, patch_size, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return model, torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def _gradients(model: nn.Module, images: torch.Tensor, bf16: bool) -> dict[str, torch.Tensor]:
    labels = torch.arange(len(images), device=images.device) % 10
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        logits = model(images)
        loss = F.cross_entropy(logits.to(images.dtype), labels)
    loss.backward()
    found: dict[str, Any] = {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()}
    return {name: value.double().cpu() for name, value in found.items()}


def _error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value - exact).norm() / exact.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("name", list(NETWORKS))
def test_training_is_as_exact_as_torchs(name: str) -> None:
    plain, images = _model(name)
    exact = _gradients(copy.deepcopy(plain).double().cuda(), images.double().cuda(), bf16=False)
    plain.cuda()
    ours = _gradients(accelerate(copy.deepcopy(plain)), images.cuda(), bf16=True)
    again = _gradients(accelerate(copy.deepcopy(plain)), images.cuda(), bf16=True)
    torchs = _gradients(plain, images.cuda(), bf16=True)
    for key, true in exact.items():
        assert torch.equal(ours[key], again[key]), f"{key} differs from one pass to the next"
        allowed = max(4 * _error(torchs[key], true), 16 * torch.finfo(torch.bfloat16).eps)
        assert _error(ours[key], true) <= allowed, key


@pytest.mark.parametrize("name", ["768/32", "1536/20"])
def test_inference_is_as_exact_as_torchs(name: str) -> None:
    plain, images = _model(name)
    images = images[:16]
    plain.eval()
    with torch.no_grad():
        exact = copy.deepcopy(plain).double().cuda()(images.double().cuda()).cpu()
        torchs = copy.deepcopy(plain).cuda().bfloat16()(images.cuda().bfloat16()).double().cpu()
    fast = optimize_for_inference(plain.cuda(), "bf16")
    for batch in (16, 1):
        logits = fast(images[:batch].cuda()).double().cpu()
        assert _error(logits, exact[:batch]) <= max(4 * _error(torchs[:batch], exact[:batch]), 0.02)
