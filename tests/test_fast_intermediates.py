"""`forward_intermediates` on the kernels gives what the plain model gives; replaced tensors are seen."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations, parametrize

from convmixer.errors import RequestError
from convmixer.fast import accelerate
from convmixer.fast.parts import parts_of
from convmixer.fast.structure import found
from convmixer.fast.support import unfit
from convmixer.kernels import why_not
from convmixer.models.convmixer import ConvMixer
from convmixer.models.isotropic import Isotropic

X = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    if reason := why_not():
        pytest.skip(f"no kernels: {reason}")


def _model(kind: str, dim: int = 20) -> Any:
    torch.manual_seed(0)
    if kind == "convmixer":
        return ConvMixer(dim, 3, 3, 2, num_classes=5)
    options: dict[str, Any] = {"stem": kind} if kind == "stride1-pool" else {"mixer": kind}
    return Isotropic(dim, 3, kernel_size=3, patch_size=2, img_size=12, num_classes=5, **options)


def _outcome(model: Any, options: dict[str, Any], bf16: bool, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return features, intermediates, gradients and buffers after a pass of `forward_intermediates`."""
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = model.forward_intermediates(images, **options)
    last, taken = (None, found) if options.get("intermediates_only") else found
    values = [*taken, *([] if last is None else [last])]
    sum((v.float() * (i + 1)).square().mean() for i, v in enumerate(values)).backward()  # type: ignore[union-attr]
    seen = {f"features {i}": v.detach() for i, v in enumerate(values)} | {"images": images.grad}
    seen |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return seen | {name: b.clone().float() for name, b in model.named_buffers()}  # type: ignore[return-value]


def _error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("convmixer", {}),
        ("convmixer", {"indices": [0, 1], "stop_early": True}),
        ("convmixer", {"indices": 1, "intermediates_only": True}),
        ("convmixer", {"indices": [1, 0], "intermediates_only": True}),
        ("linear", {"indices": [0, 2]}),
        ("stride1-pool", {"indices": [0, 1], "stop_early": True}),
    ],
)
def test_features_of_blocks_are_as_exact_as_torch(
    kind: str, options: dict[str, Any], bf16: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _model(kind).train(training)
    fast = accelerate(copy.deepcopy(plain))
    images = X.to(memory_format=torch.channels_last) if training else X
    exact = _outcome(copy.deepcopy(plain).double(), options, False, X.double())
    torchs = _outcome(plain, options, bf16, images)
    monkeypatch.setattr(ConvMixer, "_intermediates", lambda *_: pytest.fail("plain PyTorch ran"))
    ours = _outcome(fast, options, bf16, images)
    assert ours.keys() == torchs.keys() == exact.keys()
    for name, true in exact.items():
        assert ours[name].shape == torchs[name].shape
        assert ours[name].dtype is torchs[name].dtype or bf16
        assert _error(ours[name], true) <= max(3 * _error(torchs[name], true), 1e-2 if bf16 else 2e-6), name


def test_without_gradients_too() -> None:
    plain = _model("convmixer").eval()
    fast = accelerate(copy.deepcopy(plain))
    with torch.no_grad():
        last, taken = fast.forward_intermediates(X, [0, 2])
        expected, wanted = plain.forward_intermediates(X, [0, 2])
    for a, b in zip([last, *taken], [expected, *wanted], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert a.is_contiguous(memory_format=torch.channels_last)


def test_a_loss_of_one_block_leaves_those_after_it_without_gradients() -> None:
    for model in (_model("convmixer"), accelerate(_model("convmixer"))):
        model.forward_intermediates(X, [0], intermediates_only=True)[0].square().mean().backward()
        used, unused = model.blocks[0][1].weight.grad, model.blocks[1][1].weight.grad
        assert used.abs().sum() > 0
        assert unused is None or not unused.any()


@pytest.mark.parametrize("kind", ["plain", "accelerated"])
def test_no_block_asked_for_is_refused(kind: str) -> None:
    model = _model("convmixer") if kind == "plain" else accelerate(_model("convmixer"))
    for call in (model.forward_intermediates, lambda x, indices: model.prune_intermediate_layers(indices)):
        for none in (0, []):
            with pytest.raises(RequestError, match="ask for no block"):
                call(X, none)


@pytest.mark.filterwarnings("ignore")
def test_compiled_features_are_one_graph_with_the_kernels() -> None:
    fast = accelerate(_model("convmixer", 8)).eval()
    graphs: list[Any] = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: fast.forward_intermediates(x, [0, 2]), backend=keep, fullgraph=True)
    (last, taken), (expected, wanted) = compiled(X), fast.forward_intermediates(X, [0, 2])
    for a, b in zip([last, *taken], [expected, *wanted], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert sum("convmixer" in str(node.target) for graph in graphs for node in graph.graph.nodes) == 1


def _assigned(model: Any) -> None:
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()}, assign=True)


def _strided(model: Any) -> None:
    weight = model.blocks[0][1].weight
    weight.data = weight.data.flatten(1).t().contiguous().t()[:, :, None, None]


REPLACED: dict[str, Callable[[Any], Any]] = {
    "parameter": lambda m: setattr(m.blocks[0][1], "weight", nn.Parameter(m.blocks[0][1].weight.detach() * 2)),
    "module": lambda m: m.blocks[0].__setitem__(1, nn.Conv2d(m.dim, m.dim, 1)),
    "data": lambda m: setattr(m.blocks[1][3].bias, "data", m.blocks[1][3].bias.data + 1),
    "strides": _strided,
    "bf16": lambda m: m.bfloat16(),
    "statistics": lambda m: setattr(m.stem[2], "running_mean", torch.ones(m.dim)),
    "load_state_dict(assign=True)": _assigned,
    "parametrization": lambda m: parametrize.register_parametrization(m.blocks[0][1], "weight", nn.Tanh()),
    "weight norm": lambda m: parametrizations.weight_norm(m.blocks[0][0].fn[0]),
    "in place": lambda m: m.blocks[0][1].bias.detach().add_(1),
    "bias of the stem": lambda m: setattr(m.stem[0], "bias", nn.Parameter(torch.ones(m.dim))),
}


@torch.no_grad()
@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("dim", [1, 8])  # tensors of one value may be equal though they are others
@pytest.mark.parametrize("name", REPLACED)
def test_replaced_tensors_are_seen(name: str, dim: int, watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not watched:
        monkeypatch.setattr("convmixer.fast.structure.usable", lambda: False)
    plain = _model("convmixer", dim).eval()
    fast = accelerate(copy.deepcopy(plain))
    for model in (plain, fast):
        model(X)
        torch.manual_seed(0)
        REPLACED[name](model)
    images = X.bfloat16() if name == "bf16" else X
    torch.testing.assert_close(fast(images), plain(images), rtol=2e-2 if name == "bf16" else 1e-4, atol=1e-4)


def test_an_equal_parameter_in_place_of_another_is_trained() -> None:
    """With one channel, the comparison of dicts takes an equal parameter for the same one."""
    fast = accelerate(_model("convmixer", 1))
    fast(X)
    norm = fast.stem[2]
    norm.bias = nn.Parameter(norm.bias.detach().clone())
    fast(X).square().sum().backward()
    assert norm.bias.grad is not None


def test_tensors_are_listed_once() -> None:
    fast = accelerate(_model("convmixer"))
    fast(X)
    first = parts_of(fast)
    assert unfit(fast, X) is None
    assert parts_of(fast) is first
    assert first.parameters() is first.parameters()
    fast.eval()
    fast(X)
    assert parts_of(fast) is not first
    assert found(fast).parts is parts_of(fast)
