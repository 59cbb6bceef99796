"""The first blocks frozen, the others trained: on the kernels as in plain PyTorch."""

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from convmixer.fast import accelerate
from convmixer.fast.support import unfit
from convmixer.kernels import why_not
from convmixer.models.convmixer import ConvMixer
from convmixer.train.freeze import freeze, frozen_modules

DEPTH = 3


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if reason := why_not():
        pytest.skip(f"no kernels: {reason}")


def frozen_model(blocks: int, dim: int = 20) -> ConvMixer:
    torch.manual_seed(blocks)
    model = ConvMixer(dim, DEPTH, 5, patch_size=2, num_classes=7)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.running_var):
            nn.init.uniform_(tensor, 0.3, 2)
        for tensor in (norm.bias, norm.running_mean):
            nn.init.normal_(tensor, 0, 0.3)
    freeze(model, str(blocks))
    return train_mode(model)


def train_mode(model: Any) -> Any:
    model.train()
    for module in frozen_modules(model):
        module.eval()
    return model


def one_pass(model: nn.Module, bf16: bool) -> dict[str, torch.Tensor]:
    """Return logits, gradients and buffers after a forward and backward pass."""
    images = torch.randn(6, 3, 13, 16, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(images)
        loss = F.cross_entropy(logits.float(), torch.arange(6) % 7)
    loss.backward()
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients, **{name: b.clone() for name, b in model.named_buffers()}}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("blocks", range(DEPTH))
def test_frozen_blocks_run_on_the_kernels_and_the_others_learn_alike(blocks: int, bf16: bool) -> None:
    plain = frozen_model(blocks)
    fast = train_mode(accelerate(copy.deepcopy(plain)))
    assert unfit(fast, torch.zeros(1, 3, 8, 8)) is None
    before = {name: buffer.clone() for name, buffer in fast.named_buffers()}
    exact, torchs, found = one_pass(copy.deepcopy(plain).double(), False), one_pass(plain, bf16), one_pass(fast, bf16)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        own, error = ((v.double() - exact[name]).norm() for v in (torchs[name], value))
        assert error <= 3 * own + 1e-6 * exact[name].double().norm() + 1e-9, name
    frozen = ("stem.", *(f"blocks.{block}." for block in range(blocks)))
    assert not any(name.startswith(frozen) for name in found if name.endswith(".grad"))
    for name, buffer in fast.named_buffers():
        assert torch.equal(buffer, before[name]) == name.startswith(frozen), name


def test_without_gradients_the_frozen_blocks_still_keep_their_statistics() -> None:
    plain = frozen_model(1)
    fast = train_mode(accelerate(copy.deepcopy(plain)))
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), plain(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            fast.forward_features(images), plain.forward_features(images), rtol=1e-4, atol=1e-4
        )


def test_eval_norms_whose_layers_are_trained_run_in_plain_pytorch() -> None:
    plain = frozen_model(1)
    plain.blocks[0][1].weight.requires_grad_(True)
    fast = accelerate(copy.deepcopy(plain))
    assert "their layers are trained" in str(unfit(fast, torch.zeros(1, 3, 8, 8)))
    found, exact = one_pass(fast, False), one_pass(plain, False)
    torch.testing.assert_close(found["blocks.0.1.weight.grad"], exact["blocks.0.1.weight.grad"])


def test_a_norm_in_eval_mode_between_others_runs_in_plain_pytorch() -> None:
    model = accelerate(frozen_model(0).train())
    model.blocks[1][3].eval()
    assert unfit(model, torch.zeros(1, 3, 8, 8)) == "the BatchNorms differ in mode"
