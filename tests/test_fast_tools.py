"""Common tools give equal results on the plain, the accelerated and the optimised model."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn as nn
import torch.nn.functional as F
from timm.models._features import FeatureGetterNet
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from convmixer.fast import accelerate, optimize_for_inference
from convmixer.kernels import why_not
from convmixer.models.convmixer import ConvMixer

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    if reason := why_not():
        pytest.skip(f"no kernels: {reason}")


def _plain() -> Any:
    torch.manual_seed(0)
    return ConvMixer(8, 2, 3, 2, num_classes=5).eval()


def _flops(model: nn.Module) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(X)
    return counter.get_total_flops()


def _per_sample(model: nn.Module) -> torch.Tensor:
    parameters, buffers = {k: v.detach() for k, v in model.named_parameters()}, dict(model.named_buffers())

    def loss(values: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return functional_call(model, (values, buffers), (image[None],)).square().sum()

    return vmap(grad(loss), (None, 0))(parameters, X)["blocks.0.1.weight"]


def _quantised(model: nn.Module) -> torch.Tensor:
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(), (X,))
    prepared(X)
    return quantize_fx.convert_fx(prepared)(X)


def _extracted(model: nn.Module) -> torch.Tensor:
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(model, ["blocks.0"])(X)["blocks.0"]


def _calls(model: nn.Module) -> int:
    seen: list[nn.Module] = []
    handles = [module.register_forward_hook(lambda m, *_: seen.append(m)) for module in model.modules()]
    model(X)
    for handle in handles:
        handle.remove()
    return len(seen)


def _global_calls(model: nn.Module) -> int:
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    model(X)
    handle.remove()
    return len(seen)


def _tangent(model: nn.Module) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(X, torch.ones_like(X)))).tangent


def _averaged(model: nn.Module) -> torch.Tensor:
    from torch.optim.swa_utils import AveragedModel

    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    return averaged(X)


def _moving_average(model: nn.Module) -> torch.Tensor:
    from timm.utils import ModelEmaV3

    average = ModelEmaV3(model.train(), decay=0.5)
    model(X * 2)
    average.update(model)
    return average.module.eval()(X)


def _checkpointed(model: nn.Module) -> torch.Tensor:
    images = X.clone().requires_grad_()
    checkpoint(model.train(), images, use_reentrant=False).square().sum().backward()
    assert images.grad is not None
    return torch.cat([images.grad.flatten(), *(b.flatten().float() for b in model.buffers())])


def _quantisation_aware(model: Any) -> torch.Tensor:
    model.train().qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return torch.ao.quantization.prepare_qat(model)(X)  # type: ignore[no-any-return]


def _timms_weights(model: nn.Module) -> torch.Tensor:
    """Load timm's weights into the model and the other way round, every key."""
    torch.manual_seed(1)
    theirs = timm.models.convmixer.ConvMixer(dim=8, depth=2, kernel_size=3, patch_size=2, num_classes=5).eval()
    model(X)
    model.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(X), theirs(X), rtol=1e-3, atol=1e-4)
    return model(X)  # type: ignore[no-any-return]


def _in_threads(model: nn.Module) -> torch.Tensor:
    """Copies that change while other threads run the model."""

    def changed(scale: float) -> torch.Tensor:
        own: Any = copy.deepcopy(model)
        for _ in range(5):
            own.blocks[0][1].weight = nn.Parameter(own.blocks[0][1].weight.detach() * scale)
            own(X), model(X)
        return own(X).detach()

    with ThreadPoolExecutor(4) as pool:
        return torch.stack(list(pool.map(changed, (0.8, 0.9, 1.1, 1.2))))


def _grad_cam(model: Any) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    last = model.blocks[-1]
    handles = [
        last.register_forward_hook(lambda *args: seen.append(args[2])),
        last.register_full_backward_hook(lambda *args: seen.append(args[2][0])),
    ]
    model(X)[:, 1].sum().backward()
    for handle in handles:
        handle.remove()
    activations, gradients = seen
    return (activations * gradients.mean((2, 3), keepdim=True)).sum(1)


def _compiled(model: nn.Module) -> torch.Tensor:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager")(X)  # type: ignore[no-any-return]


def _traced_by_make_fx(model: nn.Module) -> torch.Tensor:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(model, tracing_mode="real")(X)(X)


# without derivatives and modules of its own, the optimised model can use these too
ANY: dict[str, Callable[[Any], Any]] = {
    "a pass": lambda m: m(X),
    "vmap": lambda m: vmap(lambda image: m(image[None]))(X),
    "deepcopy": lambda m: copy.deepcopy(m)(X),
    "fx": lambda m: torch.fx.symbolic_trace(m)(X),
    "jit.trace": lambda m: torch.jit.trace(m, (X,), check_trace=False)(X),
    "export": lambda m: torch.export.export(m, (X,)).module()(X),
    "compile": _compiled,
    "flops": _flops,
}
ACCELERATED: dict[str, Callable[[Any], Any]] = {
    **ANY,
    "grad": lambda m: grad(lambda images: m(images).square().sum())(X),
    "vjp": lambda m: vjp(m, X)[1](torch.ones(3, 5))[0],
    "jvp": lambda m: jvp(m, (X,), (torch.ones_like(X),))[1],
    "jacrev": lambda m: jacrev(m)(X[:1]),
    "jacfwd": lambda m: jacfwd(m)(X[:1, :, :2, :2]),
    "hessian": lambda m: hessian(lambda images: m(images).square().sum())(X[:1, :, :2, :2]),
    "per-sample gradients": _per_sample,
    "forward-mode AD": _tangent,
    "FX quantisation": _quantised,
    "create_feature_extractor": _extracted,
    "hooks": _calls,
    "global hooks": _global_calls,
    "GradCAM": _grad_cam,
    "make_fx": _traced_by_make_fx,
    "dynamic quantisation": lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8)(X),
    "averaged weights": _averaged,
    "checkpointing": _checkpointed,
    "EMA": _moving_average,
    "QAT": _quantisation_aware,
    "weights of timm": _timms_weights,
    "exported features": lambda m: torch.export.export(FeatureGetterNet(m, out_indices=(0, 1)), (X,)).module()(X)[1],
    "threads": _in_threads,
}


def _check(tool: Callable[[Any], Any], ours: Any) -> None:
    expected, got = tool(_plain()), tool(ours)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-3, atol=1e-4)
    else:
        assert got == expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ACCELERATED)
def test_a_tool_gives_the_same_for_an_accelerated_model(name: str) -> None:
    _check(ACCELERATED[name], accelerate(_plain()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ANY)
def test_a_tool_gives_the_same_for_an_optimised_model(name: str) -> None:
    _check(ANY[name], optimize_for_inference(_plain()))


@pytest.mark.parametrize("name", ["grad", "jvp", "forward-mode AD"])
def test_an_optimised_model_has_no_derivatives_and_says_so(name: str) -> None:
    with pytest.raises(RuntimeError, match="no derivatives"):
        ACCELERATED[name](optimize_for_inference(_plain()))


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.Conv2d, "_conv_forward"),
        (nn.BatchNorm2d, "forward"),
        (nn.GELU, "__call__"),
        (F, "gelu"),
        (F, "batch_norm"),
    ],
)
def test_what_is_replaced_for_all_modules_is_seen(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = _plain(), accelerate(_plain())
    usual, before = getattr(owner, name), fast(X)
    monkeypatch.setattr(owner, name, lambda *args, **options: 1.5 * usual(*args, **options))
    assert not torch.allclose(plain(X), before)
    torch.testing.assert_close(fast(X), plain(X), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["plain", "accelerated"])
def test_aot_inductor_packages_a_model(kind: str, tmp_path: Any) -> None:
    model = _plain() if kind == "plain" else accelerate(_plain())
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            torch.export.export(model, (X,)), package_path=str(tmp_path / "m.pt2")
        )
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(X), _plain()(X), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_flops_are_counted_in_a_compiled_model_too() -> None:
    """Its graph holds our ops, not the modules that the counter knows."""
    compiled = torch.compile(accelerate(_plain()), backend="aot_eager")
    with torch.no_grad():
        compiled(X)
    assert _flops(compiled) == pytest.approx(_flops(_plain()), rel=0.01)


@pytest.fixture
def process_group(tmp_path: Any) -> Any:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")
def test_distributed_data_parallel_trains_an_accelerated_model() -> None:
    gradients = []
    for model in (_plain(), accelerate(_plain())):
        nn.parallel.DistributedDataParallel(model.train())(X).square().sum().backward()
        gradients.append(model.blocks[0][1].weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")
def test_fully_sharded_training_of_an_accelerated_model() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    gradients = []
    for model in (_plain(), accelerate(_plain())):
        for part in (*model.blocks, model):
            fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
        model.train()(X).square().sum().backward()
        gradients.append(model.blocks[0][1].weight.grad.full_tensor())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
