"""On a GPU: batches and steps without a wait, equal bits with and without a CUDA graph, kernels where tensors are."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from convmixer.config import Config
from convmixer.data.batch_augment import Augmentation
from convmixer.data.on_device import DeviceLoader
from convmixer.data.transforms import erase
from convmixer.device import choose_device
from convmixer.fast import accelerate
from convmixer.fast.graphs import Graphs
from convmixer.models.convmixer import ConvMixer
from convmixer.preprocess import Preprocessing
from convmixer.train.engine import fit
from convmixer.train.graph import OFF, WARM_UP, StepGraph
from convmixer.train.module import TrainingModule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
P = Preprocessing(img_size=32, in_chans=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
POLICIES: dict[str, dict[str, Any]] = {
    "torchvision": {"auto_augment": "torchvision-randaugment-2-12", "hflip": 0.5},
    "timm": {"auto_augment": "rand-m9-mstd0.5-inc1", "train_interpolation": "random", "color_jitter": 0.4},
    "crop": {"scale": (0.5, 1.0), "ratio": (0.75, 1.3333), "pad_crop": 4, "vflip": 0.5},
}


@contextlib.contextmanager
def _no_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _images() -> tuple[torch.Tensor, np.ndarray]:
    draw = np.random.default_rng(0)
    return torch.from_numpy(draw.integers(0, 256, (64, 3, 32, 32), np.uint8)), draw.integers(0, 7, 64)


@pytest.mark.parametrize("policy", list(POLICIES))
def test_augmented_images_are_those_of_the_cpu(policy: str) -> None:
    """Up to one level where sampling rounds."""
    config, (images, _) = Config(**POLICIES[policy]), _images()
    drawn = Augmentation(config, P, torch.device("cpu")).draw(0, np.arange(64))
    on_cpu, on_gpu = (
        Augmentation(config, P, place).apply(images.to(place), torch.from_numpy(drawn).to(place), drawn).cpu()
        for place in (torch.device("cpu"), choose_device("cuda"))
    )
    levels = (on_cpu - on_gpu).abs() * torch.tensor(P.std)[:, None, None] * 255
    assert levels.max() < 2.5  # two layers
    assert (levels > 0.5).float().mean() < 0.001


@pytest.mark.parametrize("policy", list(POLICIES))
def test_batches_are_made_without_a_wait_and_equal_with_a_graph(policy: str) -> None:
    images, labels = _images()
    place, config = choose_device("cuda"), Config(**POLICIES[policy])
    made = []
    for as_graph in (Graphs, None):
        loader = iter(DeviceLoader(images.to(place), labels, config, P, batch_size=16, as_graph=as_graph))
        batches = [next(loader)]  # captures
        with _no_waits():
            batches += [next(loader) for _ in range(5)]
        made.append(batches)
    for with_graph, without in zip(*made, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(with_graph, without, strict=True))


@pytest.mark.parametrize("mode", ["pixel", "const", "rand"])
def test_erasing_does_not_wait(mode: str) -> None:
    images = torch.randn(64, 3, 32, 32, device=choose_device("cuda"))
    with _no_waits():
        erased = erase(images.clone(), Config(random_erasing=0.5, erasing_mode=mode), torch.Generator())
    assert 10 < (erased != images).flatten(1).any(1).sum() < 54


def _trained(precision: str, steps: int = WARM_UP + 4) -> tuple[dict[str, torch.Tensor], TrainingModule]:
    torch.manual_seed(0)
    model = accelerate(ConvMixer(64, 2, 5, 2, num_classes=7).to(choose_device("cuda")))
    config = Config(precision=precision, clip_norm=1.0, mixup=0.5, random_erasing=0.3, ema_decay=0.9, grad_accum=2)
    module = TrainingModule(model, config, num_classes=7, steps_per_epoch=steps, epochs=1)
    draw = torch.Generator().manual_seed(1)
    batches = [[torch.randn(16, 3, 32, 32, generator=draw), torch.arange(16) % 7] for _ in range(steps)]
    had_graph = []

    def after_step() -> bool:
        had_graph.append(isinstance(module._update, StepGraph) and module._update._graph is not None)
        return False

    fit(module, batches, steps, after_step)
    state = {name: value.clone() for name, value in module.model.state_dict().items()}
    return state | {"loss": module.loss_sum.clone(), "graph": torch.tensor(had_graph[-1])}, module


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_graph_gives_the_bits_of_plain_steps(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = _trained(precision)
    monkeypatch.setenv(OFF, "0")
    plain, _ = _trained(precision)
    assert graph.pop("graph")
    assert not plain.pop("graph")
    assert [name for name, value in graph.items() if not torch.equal(value, plain[name])] == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_kernels_run_where_the_tensors_are() -> None:
    torch.manual_seed(0)
    plain = ConvMixer(64, 2, 5, 2, num_classes=7).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        found = accelerate(plain.to("cuda:1"))(images.to("cuda:1")).cpu()
        torch.testing.assert_close(found, ConvMixer.forward(plain.cpu(), images), rtol=1e-3, atol=1e-3)
