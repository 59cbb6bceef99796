"""Whatever is changed in a model, the accelerated and the optimised one give what the plain one gives."""

import contextlib
import copy
import random
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from convmixer.fast import accelerate, optimize_for_inference
from convmixer.fast.support import unfit
from convmixer.kernels import why_not
from convmixer.models.convmixer import ConvMixer
from convmixer.models.isotropic import MIXERS, STEMS, Isotropic
from convmixer.models.layers import DepthwiseConv2d


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    if reason := why_not():
        pytest.skip(f"no kernels: {reason}")


class Double(nn.Module):
    """A parametrization that changes the weights."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def _of(model: nn.Module, *kinds: type) -> list[Any]:
    return [m for m in model.modules() if type(m) in kinds]


def _conv(model: nn.Module, pick: random.Random) -> Any:
    return pick.choice(_of(model, nn.Conv2d, DepthwiseConv2d))


def _norm(model: nn.Module, pick: random.Random) -> Any:
    return pick.choice(_of(model, nn.BatchNorm2d))


def _act(model: nn.Module, pick: random.Random) -> Any:
    return pick.choice(_of(model, nn.GELU, nn.ReLU))


def _any(model: nn.Module, pick: random.Random) -> Any:
    return pick.choice([m for m in model.modules() if m is not model])


def _block(model: Any, pick: random.Random) -> tuple[nn.Sequential, int]:
    return model.blocks, pick.randrange(len(model.blocks))


def _set(module: Any, name: str, value: Any) -> None:
    setattr(module, name, value)


def _dilate(model: nn.Module, pick: random.Random) -> None:
    conv = _conv(model, pick)
    conv.dilation = (2, 2)
    conv.padding = tuple((2 * (k - 1) + 1) // 2 for k in conv.kernel_size)


def _group(model: nn.Module, pick: random.Random) -> None:
    conv = pick.choice([c for c in _of(model, nn.Conv2d) if c.in_channels % 2 == 0])
    conv.groups, conv.weight = 2, nn.Parameter(conv.weight[:, : conv.in_channels // 2].detach().clone())


def _half_hidden(module: nn.Module, args: tuple[Any, ...], output: Any = None) -> Any:
    return output * 0.5 if isinstance(output, torch.Tensor) else None


def _own_forward(model: nn.Module, pick: random.Random) -> None:
    module = pick.choice([m for m in model.modules() if m is not model and not isinstance(m, nn.Dropout)])
    usual = type(module).forward
    module.forward = types.MethodType(lambda self, x: usual(self, x) + 0.5, module)


def _insert(model: Any, pick: random.Random, module: nn.Module) -> None:
    blocks, i = _block(model, pick)
    blocks[i].append(module)


def _other_shape(weight: torch.Tensor, pick: random.Random) -> torch.Tensor:
    return torch.randn(*weight.shape[:2], *pick.choice([(1, 1), (5, 5), (1, 3)])) / 5


def _doubled_parameter(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(2 * weight.detach())


def _kernel(model: nn.Module, pick: random.Random) -> None:
    conv = pick.choice(_of(model, DepthwiseConv2d) or _of(model, nn.Conv2d))
    conv.weight = nn.Parameter(torch.randn(*conv.weight.shape[:2], 1, 3))
    conv.kernel_size, conv.padding = (1, 3), (0, 1)


def _mode(model: nn.Module, pick: random.Random) -> None:
    _norm(model, pick).train(not model.training)


CHANGES: dict[str, Callable[[Any, random.Random], Any]] = {
    "nothing": lambda m, r: None,
    "dilation": _dilate,
    "stride": lambda m, r: _set(_conv(m, r), "stride", (2, 2)),
    "padding": lambda m, r: _set(_conv(m, r), "padding", (1, 1)),
    "padding as a word": lambda m, r: _set(_conv(m, r), "padding", "same"),
    "padding mode": lambda m, r: _set(_conv(m, r), "padding_mode", r.choice(["circular", "reflect"])),
    "groups": _group,
    "no bias": lambda m, r: _set(_conv(m, r), "bias", None),
    "kernel": _kernel,
    "weights": lambda m, r: nn.init.normal_(_conv(m, r).weight, std=0.1),
    "another weight": lambda m, r: _set(c := _conv(m, r), "weight", nn.Parameter(c.weight.detach() * 1.5)),
    "data": lambda m, r: _set((c := _conv(m, r)).weight, "data", c.weight.data * 0.5),
    "data of another shape": lambda m, r: _set(w := _conv(m, r).weight, "data", _other_shape(w, r)),
    "statistics of another type": lambda m, r: _set((n := _norm(m, r)).running_var, "data", n.running_var.double()),
    "swapped": lambda m, r: torch.utils.swap_tensors((c := _conv(m, r)).weight, _doubled_parameter(c.weight)),
    "double": lambda m, r: _any(m, r).double(),
    "bf16": lambda m, r: _any(m, r).bfloat16(),
    "tanh": lambda m, r: _set(_act(m, r), "approximate", "tanh"),
    "inplace": lambda m, r: _set(_act(m, r), "inplace", True),
    "another activation": lambda m, r: _replace(m, _act(m, r), nn.SiLU()),
    "relu": lambda m, r: _replace(m, _act(m, r), nn.ReLU()),
    "eps": lambda m, r: _set(_norm(m, r), "eps", 0.1),
    "momentum": lambda m, r: _set(_norm(m, r), "momentum", r.choice([None, 0.5])),
    "mode": _mode,
    "untracked": lambda m, r: _set(_norm(m, r), "track_running_stats", False),
    "no statistics": lambda m, r: [_set(n, k, None) for n in [_norm(m, r)] for k in ("running_mean", "running_var")],
    "no count": lambda m, r: _set(_norm(m, r), "num_batches_tracked", None),
    "no affine": lambda m, r: [_set(n, k, None) for n in [_norm(m, r)] for k in ("weight", "bias")],
    "statistics": lambda m, r: nn.init.uniform_(_norm(m, r).running_var, 0.5, 2),
    "group norm": lambda m, r: _replace(m, n := _norm(m, r), nn.GroupNorm(1, n.num_features)),
    "own forward": _own_forward,
    "own method": lambda m, r: _set(m, "forward_features", lambda x: ConvMixer.forward_features(m, x) * 2),
    "forward hook": lambda m, r: _any(m, r).register_forward_hook(_half_hidden),
    "pre hook": lambda m, r: _any(m, r).register_forward_pre_hook(lambda _, a: (a[0] * 0.5, *a[1:])),
    "backward hook": lambda m, r: _conv(m, r).register_full_backward_hook(lambda _, g, o: (g[0] * 2, *g[1:])),
    "parametrization": lambda m, r: parametrize.register_parametrization(_conv(m, r), "weight", Double()),
    "weight norm": lambda m, r: parametrizations.weight_norm(_conv(m, r)),
    "pruning": lambda m, r: prune.l1_unstructured(_conv(m, r), "weight", 0.5),
    "identity": lambda m, r: _set_item(*_block(m, r), nn.Identity()),
    "fewer blocks": lambda m, r: _set(m, "blocks", m.blocks[: r.randrange(len(m.blocks))]),
    "one more": lambda m, r: _insert(m, r, nn.Tanh()),
    "subclass": lambda m, r: _set(c := _conv(m, r), "__class__", type("Own", (type(c),), {"forward": _doubled})),
    "frozen": lambda m, r: [p.requires_grad_(False) for p in _any(m, r).parameters()],
    "head": lambda m, r: _set(m, "head", nn.Sequential(nn.Linear(m.dim, 4), nn.Tanh())),
    "head hook": lambda m, r: m.head.register_forward_hook(_half_hidden),
    "checkpointing": lambda m, r: m.set_grad_checkpointing(),
    "eval": lambda m, r: m.eval(),
    "own _conv_forward": lambda m, r: _set(c := _conv(m, r), "_conv_forward", _doubled_conv(c)),
    "own features": lambda m, r: _set(
        m, "__class__", type("Own", (type(m),), {"forward_features": _doubled_features})
    ),
    "own _run": lambda m, r: _set(m, "__class__", type("Own", (type(m),), {"_run": lambda s, b, x: 2 * b(x)})),
    "tied weights": lambda m, r: _set(m.blocks[-1][1], "weight", m.blocks[0][1].weight),
    "shared norm": lambda m, r: _set_item(m.blocks[-1], 3, m.blocks[0][3]),
    "shared block": lambda m, r: _set_item(m.blocks, len(m.blocks) - 1, m.blocks[0]),
    "no eps": lambda m, r: [_set(n, "eps", 0.0) for n in _of(m, nn.BatchNorm2d)],
    "eps of all": lambda m, r: [_set(n, "eps", 0.1) for n in _of(m, nn.BatchNorm2d)],
    "meta": lambda m, r: m.to("meta"),
    "parameter hook": lambda m, r: _conv(m, r).weight.register_hook(lambda g: g * 2) and None,
}


def _doubled(self: Any, x: torch.Tensor) -> torch.Tensor:
    return 2 * type(self).__mro__[1].forward(self, x)  # type: ignore[attr-defined]


def _doubled_features(self: Any, x: torch.Tensor) -> torch.Tensor:
    return 2 * type(self).__mro__[1].forward_features(self, x)  # type: ignore[attr-defined]


def _doubled_conv(conv: Any) -> Callable[..., torch.Tensor]:
    return lambda x, weight, bias: 2 * nn.Conv2d._conv_forward(conv, x, weight, bias)


def _set_item(parts: nn.Sequential, i: int, module: nn.Module) -> None:
    parts[i] = module


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


def _model(pick: random.Random) -> Any:
    torch.manual_seed(pick.randrange(1000))
    act = pick.choice(["gelu", "relu"])
    if pick.random() < 0.6:
        return ConvMixer(8, 2, pick.choice([2, 3]), 2, num_classes=5, act=act)
    kind = pick.choice([{"mixer": pick.choice(MIXERS)}, {"stem": pick.choice(STEMS)}])
    options: dict[str, Any] = {**kind, "img_size": 8, "patch_size": 2, "kernel_size": 3, "num_classes": 5, "act": act}
    return Isotropic(8, 2, **options)


def _outcome(model: Any, images: torch.Tensor, bf16: bool) -> Any:
    """Return logits, gradients and statistics of a pass, or that it raised."""
    images = images.clone().requires_grad_()
    model.zero_grad()
    try:
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(images)
            loss = F.cross_entropy(logits.float(), torch.arange(len(images)) % logits.shape[1])
        loss.backward()
    except Exception:
        return "raises"
    gradients = [images.grad, *(p.grad for p in model.parameters())]
    return [logits, *(g for g in gradients if g is not None), *model.buffers()]


BF16 = 0.2, 5e-2  # share of the norm, and more: gradients of few values nearly cancel, and both sides round


def _differ(ours: Any, plain: Any, bf16: bool) -> bool:
    if "raises" in (ours, plain) if isinstance(ours, str) or isinstance(plain, str) else False:
        return ours is not plain
    share, more = BF16 if bf16 else (2e-3, 1e-5)
    if len(ours) != len(plain):
        return True
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(ours, plain, strict=True)]
    return any((a - b).norm() > share * b.norm() + more for a, b in pairs)


def _nearer(ours: Any, plain: Any, exact: Any) -> bool:
    """Return whether ours is as near to fp32 as PyTorch's bf16: one rounding more can flip a ReLU, and a gradient."""
    if any(isinstance(found, str) for found in (ours, plain, exact)) or not len(ours) == len(plain) == len(exact):
        return False
    triples = [[t.detach().double() for t in found] for found in zip(ours, plain, exact, strict=True)]
    return all((a - e).norm() <= max(1.1 * (b - e).norm(), BF16[0] * e.norm() + BF16[1]) for a, b, e in triples)


def _try(seed: int) -> str | None:
    """Change a random model once or twice, and once more after a pass; return how it differs from the plain one."""
    pick = random.Random(seed)
    plain = _model(pick).train(pick.random() < 0.7)
    fast = accelerate(copy.deepcopy(plain))
    names = pick.choices(list(CHANGES), k=pick.choice([1, 1, 2]))
    bf16 = pick.random() < 0.2
    images = torch.randn(6, 3, 8, 8)
    seen = [_outcome(model, images, bf16) for model in (fast, plain)]  # what was found before must not be kept
    for when in range(len(names)):
        for model in (fast, plain):
            _apply(names[when], model, random.Random(seed + when))
        seen = [_outcome(model, images, bf16) for model in (fast, plain)]
        if _differ(*seen, bf16) and not (bf16 and _nearer(*seen, _outcome(copy.deepcopy(plain), images, False))):
            return f"seed {seed}, {type(plain).__name__}, {names[: when + 1]}, {unfit(fast, images)}: {seen}"[:2000]
    return _try_optimized(seed, plain, names) if not bf16 else None


def _apply(name: str, model: Any, pick: random.Random) -> None:
    torch.manual_seed(0)
    with contextlib.suppress(IndexError, ValueError, AttributeError, KeyError, RuntimeError):  # not applicable
        CHANGES[name](model, pick)


def _try_optimized(seed: int, plain: Any, names: list[str]) -> str | None:
    images = torch.randn(2, 3, 8, 8)
    results = []
    for run in (lambda: optimize_for_inference(plain)(images), lambda: plain.eval()(images).float()):
        try:
            with torch.no_grad():
                results.append([run()])
        except Exception:
            results.append("raises")
    if _differ(*results, False):
        return f"seed {seed}, {type(plain).__name__}, {names}, optimised: {results}"[:2000]
    return None


@pytest.mark.filterwarnings("ignore")
def test_30_random_changes_make_no_difference() -> None:
    assert [difference for seed in range(30) if (difference := _try(seed))] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_500_random_changes_make_no_difference() -> None:
    assert [difference for seed in range(1000, 1500) if (difference := _try(seed))] == []


def test_an_overlooked_attribute_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The property test itself fails if nothing is looked at."""
    monkeypatch.setattr("convmixer.fast.training.unfit", lambda model, x: None)
    assert any(_try(seed) for seed in range(20))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHANGES)
def test_each_change_alone(name: str) -> None:
    images = torch.randn(6, 3, 8, 8)
    for seed in range(3):
        torch.manual_seed(0)
        plain = ConvMixer(8, 2, 3, 2, num_classes=5)
        fast = accelerate(copy.deepcopy(plain))
        fast(images), plain(images)
        for model in (fast, plain):
            _apply(name, model, random.Random(seed))
        assert not _differ(_outcome(fast, images, False), _outcome(plain, images, False), False)
