"""An accelerated model against the plain one: the same numbers, keys and interface; plain PyTorch if it must be."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from convmixer.fast import accelerate, uses_kernels
from convmixer.fast.parts import parts_of
from convmixer.fast.support import say_once
from convmixer.fast.training import FastConvMixer, FastIsotropic
from convmixer.kernels import blocks, why_not
from convmixer.models.convmixer import ConvMixer
from convmixer.models.isotropic import MIXERS, STEMS, Isotropic


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if reason := why_not():
        pytest.skip(f"no kernels: {reason}")


def _model(dim: int = 44, kernel_size: int = 5, act: str = "gelu", depth: int = 2) -> ConvMixer:
    torch.manual_seed(0)
    return _with_odd_norms(ConvMixer(dim, depth, kernel_size, patch_size=2, num_classes=7, act=act))


def _isotropic(dim: int = 20, **options: str) -> Isotropic:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"kernel_size": 3, "patch_size": 2, "num_classes": 7, "img_size": 12}
    return _with_odd_norms(Isotropic(dim, 2, **options, **sizes))


def _with_odd_norms(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return model


def _images(batch: int = 3, size: tuple[int, int] = (17, 22)) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))  # 17: one row is left over


def _pass(model: nn.Module, images: torch.Tensor, bf16: bool) -> list[torch.Tensor]:
    """Return logits, input gradient, parameter gradients and buffers after one forward and backward pass."""
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(images)
        loss = F.cross_entropy(logits, torch.arange(len(images)) % 7)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    return [logits.detach(), images.grad, *gradients, *(b.clone().float() for b in model.buffers())]


def _error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("act", ["gelu", "relu"])
@pytest.mark.parametrize("kernel_size", [5, 8])
def test_gradients_are_as_exact_as_torch(kernel_size: int, act: str, bf16: bool, training: bool) -> None:
    plain = _model(kernel_size=kernel_size, act=act).train(training)
    fast = accelerate(copy.deepcopy(plain))
    assert type(fast) is FastConvMixer
    _check_exactness(plain, fast, _images(), bf16)


@pytest.mark.parametrize("model", [_model(), _isotropic()])
@pytest.mark.parametrize("size", [(1, 8), (8, 1)])
def test_an_image_smaller_than_a_patch_is_refused(model: Any, size: tuple[int, int]) -> None:
    fast = accelerate(copy.deepcopy(model)).train()
    with pytest.raises(ValueError, match="smaller than a patch"):
        fast(_images(size=size))
    assert all(torch.isfinite(buffer).all() for buffer in fast.buffers())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("option", [*(("mixer", name) for name in MIXERS), *(("stem", name) for name in STEMS)])
def test_other_mixers_and_stems_are_as_exact(option: tuple[str, str], bf16: bool, training: bool) -> None:
    plain = _isotropic(**dict([option])).train(training)
    fast = accelerate(copy.deepcopy(plain))
    assert type(fast) is FastIsotropic
    assert uses_kernels(fast)
    _check_exactness(plain, fast, _images(5, (12, 12)), bf16)


@pytest.mark.parametrize("bf16", [False, True])
def test_an_odd_number_of_channels_and_of_rows_is_as_exact(bf16: bool) -> None:
    """If bf16 values are multiplied in pairs, the last one has no partner."""
    plain = _isotropic(21, mixer="none")
    _check_exactness(plain, accelerate(copy.deepcopy(plain)), _images(3, (10, 10)), bf16)


@pytest.mark.parametrize("training", [True, False])
def test_blocks_with_different_mixers_are_as_exact(training: bool) -> None:
    plain = _isotropic(mixer="depthwise").train(training)
    plain.blocks[1][0].fn[0] = nn.AvgPool2d(3, 1, 1)
    _check_exactness(plain, accelerate(copy.deepcopy(plain)), _images(5, (12, 12)), False)


@pytest.mark.parametrize("training", [True, False])
def test_a_pool_that_leaves_pixels_out_is_as_exact(training: bool) -> None:
    plain = _isotropic(stem="stride1-pool").train(training)
    _check_exactness(plain, accelerate(copy.deepcopy(plain)), _images(5, (14, 13)), False)


@pytest.mark.parametrize("option", [("residual", "both"), ("norm", "layer")])
def test_what_the_kernels_do_not_know_stays_as_it_is(option: tuple[str, str]) -> None:
    model = accelerate(_isotropic(**dict([option])))
    assert type(model) is Isotropic
    assert not uses_kernels(model)


def _check_exactness(plain: nn.Module, fast: nn.Module, images: torch.Tensor, bf16: bool, factor: float = 3) -> None:
    names = ["logits", "images", *dict(plain.named_parameters()), *dict(plain.named_buffers())]
    exact = _pass(copy.deepcopy(plain).double(), images.double(), False)
    torchs, ours = _pass(plain, images, bf16), _pass(fast, images, bf16)
    for name, mine, other, true in zip(names, ours, torchs, exact, strict=True):
        # a few times torch's own error, in the norm of the whole tensor; below that one unit of the storage dtype
        allowed = max(factor * _error(other, true), 4e-3 if bf16 else 1e-6)
        assert _error(mine, true) <= allowed, name


def test_keys_parameters_and_interface_stay() -> None:
    plain = _model()
    parameters, keys = list(plain.parameters()), list(plain.state_dict())
    fast = accelerate(plain)
    assert fast is plain
    assert list(fast.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters, fast.parameters(), strict=True))
    assert isinstance(fast, ConvMixer)
    fast.reset_classifier(0)
    with torch.no_grad():
        features = fast.eval().forward_features(_images())
        torch.testing.assert_close(features.mean((2, 3)), fast(_images()), rtol=1e-4, atol=1e-5)


def test_a_wrapped_model_is_found() -> None:
    assert type(accelerate(nn.Sequential(_model()))[0]) is FastConvMixer


def test_ten_steps_follow_the_plain_model() -> None:
    plain = _model()
    fast = accelerate(copy.deepcopy(plain))
    losses = []
    for model in (plain, fast):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(10):
            loss = F.cross_entropy(model(_images(8) * (1 + step / 10)), torch.arange(8) % 7)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[10:] == pytest.approx(losses[:10], rel=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_repeats_are_equal_in_every_bit(bf16: bool) -> None:
    fast = accelerate(_model())
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            first, second = (_pass(copy.deepcopy(fast), _images(), bf16) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_a_second_backward_pass_through_one_graph() -> None:
    fast = accelerate(_model())
    loss = fast(_images()).square().mean()
    first = torch.autograd.grad(loss, list(fast.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(fast.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_pass_through(value: float) -> None:
    plain = _model(kernel_size=3).eval()
    fast = accelerate(copy.deepcopy(plain))
    images = _images(2)
    images[0, 0, 4, 4] = value
    with torch.no_grad():
        # torch's bf16 convolutions spread NaN to pixels that do not see it, if the processor has AMX
        expected = plain.forward_features(images)
        for bf16 in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                features = fast.forward_features(images)
            assert torch.equal(expected.isnan(), features.isnan())
            assert torch.equal(expected.isinf(), features.isinf())


def test_unusual_models_run_plain(capfd: pytest.CaptureFixture[str]) -> None:
    say_once.cache_clear()  # another test may have had the same reasons
    images = _images()
    overlapping = accelerate(_isotropic(stem="overlap"))
    overlapping.blocks[0][0].fn[0].register_forward_hook(lambda module, args, output: calls.append(output))
    calls: list[torch.Tensor] = []
    overlapping(_images(2, (12, 12)))
    assert len(calls) == 1  # the depthwise convolution of another stem's model is a module too
    hooked, checkpointed, synced, tanh = (accelerate(_model()) for _ in range(4))
    seen: list[torch.Tensor] = []
    hooked.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    checkpointed.set_grad_checkpointing()
    synced.blocks[0][0].fn[2].momentum = None
    tanh.stem[1] = nn.Tanh()
    for model in (hooked, checkpointed, synced, tanh):
        plain = copy.deepcopy(model)
        plain.__class__ = ConvMixer
        assert torch.equal(model(images), plain(images))
    assert len(seen) == 2
    said = capfd.readouterr().err
    assert "gradient checkpointing" in said
    assert "no momentum" in said
    assert "the model has a" in said


def test_switched_off_by_the_environment() -> None:
    code = (
        "from convmixer.fast import accelerate; from convmixer import create_model;"
        "m = accelerate(create_model('convmixer_128_4')); accelerate(m); print(type(m).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"CONVMIXER_KERNELS": "0"}, capture_output=True, text=True
    )
    assert done.stdout == "ConvMixer\n"
    assert done.stderr.count("CONVMIXER_KERNELS=0") == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads it of tensors that are no leaves
@pytest.mark.parametrize("pool", [False, True])
def test_blocks_op_is_well_formed(pool: bool) -> None:
    fast = accelerate(_model(dim=8))
    parameters = [p.detach().clone().requires_grad_() for p in _flat(fast)]
    v = torch.randn(2, 5, 6, 8).requires_grad_()
    args = (v, parameters, [], 1e-5, 0, True, pool, [0, 1])
    torch.library.opcheck(torch.ops.convmixer.blocks, (*args, True))
    blocks.features(*args)
    without = [p.detach() for p in parameters]
    torch.library.opcheck(torch.ops.convmixer.blocks, (v.detach(), without, *args[2:], False))


def test_without_gradients_nothing_is_kept() -> None:
    fast = accelerate(_model(dim=8)).eval()
    norms = [m for m in fast.modules() if isinstance(m, nn.BatchNorm2d)]
    running = [t for n in norms for t in (n.running_mean, n.running_var)]
    v = torch.randn(2, 5, 6, 8)
    with torch.no_grad():
        _, kept = torch.ops.convmixer.blocks(v, _flat(fast), running, 1e-5, 0, False, False, [], False)
    assert [tuple(t.shape) for t in kept] == [(len(norms), 2, 8)]


@pytest.mark.parametrize("mixer", ["depthwise", "linear"])
def test_a_mean_far_above_the_deviation_costs_no_digits(mixer: str) -> None:
    """Sums of squares in fp32 would lose the variance."""
    plain = _isotropic(mixer=mixer).train()
    plain.stem[0].bias.data += 1000
    images = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    fast = accelerate(copy.deepcopy(plain))
    exact = _pass(copy.deepcopy(plain).double(), images.double(), False)
    ours, torchs = _pass(fast, images, False), _pass(plain, images, False)
    rest = slice(2, None)  # all together, as the gradients of some biases are only rounding
    for part in (slice(1), slice(1, 2), rest):
        a, b, true = (torch.cat([t.flatten() for t in values[part]]) for values in (ours, torchs, exact))
        assert _error(a, true) <= max(5 * _error(b, true), 1e-5)


@pytest.mark.parametrize("mixer", ["depthwise", "linear"])
def test_a_second_derivative_is_refused(mixer: str) -> None:
    images = _images(2, (12, 12)).requires_grad_()
    logits = accelerate(_isotropic(mixer=mixer))(images)
    (first,) = torch.autograd.grad(logits.square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative|once"):
        first.square().sum().backward()


@pytest.mark.parametrize("mixer", ["depthwise", "linear"])
def test_batched_gradients_are_refused(mixer: str) -> None:
    images = _images(2, (12, 12)).requires_grad_()
    logits = accelerate(_isotropic(mixer=mixer))(images)
    with pytest.raises(RuntimeError, match="is_grads_batched: CONVMIXER_KERNELS=0"):
        torch.autograd.grad(logits, images, torch.ones(3, *logits.shape), is_grads_batched=True)


def test_an_unpickled_model_finds_the_kernels_or_does_without(tmp_path: Path) -> None:
    fast, images = accelerate(_model()).eval(), _images()
    torch.save((fast, images), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, images = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.save(model(images).detach(), sys.argv[2])\n"
        "print(type(model).__name__)\n"
    )
    for value, name in (("1", "FastConvMixer"), ("0", "ConvMixer")):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "model.pt"), str(tmp_path / "logits.pt")],
            env=os.environ | {"CONVMIXER_KERNELS": value},
            capture_output=True,
            text=True,
        )
        assert done.stdout == f"{name}\n", done.stderr
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), fast(images).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stem", ["patch", "overlap", "stride1-pool"])
def test_an_empty_batch_gives_no_logits(stem: str) -> None:
    assert accelerate(_isotropic(stem=stem)).eval()(torch.empty(0, 3, 12, 12)).shape == (0, 7)
    assert accelerate(_model()).eval()(torch.empty(0, 3, 12, 12)).shape == (0, 7)


@pytest.mark.parametrize("stem", ["patch", "stride1-pool"])
def test_an_empty_batch_in_training_changes_nothing_but_the_count(stem: str) -> None:
    model = accelerate(_isotropic(stem=stem)).train()
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    model(torch.empty(0, 3, 12, 12)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers() if name in before)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_weights_of_any_strides_are_read_as_they_are() -> None:
    plain = _model()
    pointwise, depthwise = plain.blocks[0][1], plain.blocks[1][0].fn[0]
    pointwise.weight = nn.Parameter(pointwise.weight.detach().permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3))
    depthwise.weight = nn.Parameter(depthwise.weight.detach().permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1))
    assert not pointwise.weight.is_contiguous()
    assert not depthwise.weight.is_contiguous()
    _check_exactness(plain, accelerate(copy.deepcopy(plain)), _images(), False)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_batch_of_many_rows_and_images(bf16: bool) -> None:
    """Every thread has several rounds of rows, and every group several images."""
    plain = _model(kernel_size=3)
    # torch adds pairwise, we row by row: 20,000 gradients that nearly cancel
    _check_exactness(plain, accelerate(copy.deepcopy(plain)), _images(20, (64, 64)), bf16, factor=5)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_layer_wider_than_its_parts(bf16: bool) -> None:
    """More channels than one part of the weight gradient, with a remainder, and not a multiple of any vector."""
    plain = _model(dim=132, kernel_size=3)
    # 1,500 gradients that nearly cancel, which torch adds pairwise
    _check_exactness(plain, accelerate(copy.deepcopy(plain)), _images(6, (32, 32)), bf16, factor=5)


def test_features_are_channels_last_at_any_width() -> None:
    features = accelerate(_model()).forward_features(_images())
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert features.shape[1] == 44


def _flat(fast: nn.Module) -> list[torch.Tensor]:
    return parts_of(fast).parameters()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiles_as_one_graph() -> None:
    fast = accelerate(_model())
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert _error(compiled(_images()), fast(_images()).double()) < 1e-5
    first, second = _pass(copy.deepcopy(fast), _images(), False), _pass(compiled, _images(), False)
    for a, b in zip(first[:10], second[:10], strict=True):
        assert _error(a, b.double()) < 1e-4
