"""The optimizer step: it learns, parts of a batch add up, settings reach the optimizer, time budgets are kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn

from convmixer.config import Config
from convmixer.models.convmixer import ConvMixer
from convmixer.recipes import load_recipe
from convmixer.train.checkpoint import load_checkpoint
from convmixer.train.engine import fit, measure_speed
from convmixer.train.module import TrainingModule
from convmixer.train.run import train
from convmixer.train.schedule import rate_at_step
from convmixer.train.setup import prepare


def _batch(n: int = 16, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.randint(classes, (n,), generator=generator)


def _train(model: nn.Module, config: Config, batches: list[Any]) -> TrainingModule:
    module = TrainingModule(model, config, num_classes=4, steps_per_epoch=len(batches), epochs=1)
    fit(module, batches, len(batches), lambda: False)
    return module


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_batch_is_overfitted(precision: str) -> None:
    torch.manual_seed(0)
    images, labels = _batch()
    module = _train(
        ConvMixer(32, 2, 3, 2, num_classes=4), Config(precision=precision, lr=0.01), [(images, labels)] * 60
    )
    logits = module.model(images).argmax(1)  # still in train mode: the batch statistics it was trained with
    assert logits.equal(labels)
    assert module.steps_done == 60


def test_parts_of_a_batch_add_up_to_the_batch() -> None:
    # without BatchNorm, whose statistics are those of a part; fp32 sums in another order: hence a tolerance
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.GELU(), nn.Linear(32, 4))
        config = Config(precision="fp32", grad_accum=parts, batch_size=16, mixup=0.3, smoothing=0.1)
        results.append(_train(model, config, [_batch()] * 5).model.state_dict())
    for key in results[0]:
        torch.testing.assert_close(results[0][key], results[1][key], rtol=1e-5, atol=1e-6)


def test_images_are_erased_after_they_are_mixed() -> None:
    seen: list[torch.Tensor] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    config = Config(precision="fp32", mixup=1.0, cutmix=0.0, random_erasing=0.5, erasing_mode="const")
    _train(model, config, [(torch.ones(16, 3, 8, 8), torch.arange(16) % 4)])
    whole = (seen[0] - 1).abs() < 1e-5  # ones mixed with ones
    assert 0.5 < whole.float().mean() < 1
    assert not seen[0][~whole].any()  # a box that was there before would have been mixed with ones


def test_gradients_are_clipped_to_the_norm_before_the_step() -> None:
    norms = []
    for clip in (0.0, 0.05):
        torch.manual_seed(0)
        module = _train(ConvMixer(8, 1, 3, 2, num_classes=4), Config(precision="fp32", clip_norm=clip), [_batch()])
        norms.append(torch.stack([p.grad.norm() for p in module.model.parameters() if p.grad is not None]).norm())
    assert norms[0] > 0.1
    torch.testing.assert_close(norms[1], torch.tensor(0.05), rtol=1e-3, atol=0)


def test_average_is_the_documented_function_of_the_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    module = TrainingModule(
        model, Config(precision="fp32", ema_decay=0.7), num_classes=4, steps_per_epoch=6, epochs=1
    )
    weights = []

    def remember() -> bool:
        weights.append(model[1].weight.detach().clone())
        return False

    fit(module, [_batch()] * 6, 6, remember)
    expected = weights[0]
    for step, new in enumerate(weights[1:], 1):
        decay = min(0.7, 1 - (1 + step) ** (-2 / 3))
        expected = decay * expected + (1 - decay) * new
    torch.testing.assert_close(module.evaluated[1].weight, expected, rtol=1e-5, atol=1e-7)  # type: ignore[index]


@pytest.mark.parametrize("recipe", ["digits", "authors-cifar10", "paper-cifar10"])
def test_the_recipe_reaches_the_optimizer_of_the_run(recipe: str) -> None:
    overrides = {"img_size": 8, "mean": None, "std": None, "model": "convmixer_8_2_p1_k3", "workers": 0}
    config = Config(**(load_recipe(recipe).__dict__ | overrides))
    module = prepare("digits", config).module(config.epochs)
    groups = module.optimizer.param_groups
    assert isinstance(module.optimizer, torch.optim.AdamW)
    assert {g["eps"] for g in groups} == {config.eps}
    assert {g["weight_decay"] for g in groups if any(p.ndim > 1 for p in g["params"])} == {config.weight_decay}
    flat = {g["weight_decay"] for g in groups if any(p.ndim == 1 for p in g["params"])}
    assert flat == {config.weight_decay if recipe == "authors-cifar10" else 0.0}
    assert module.config.clip_norm == (0.0 if recipe == "authors-cifar10" else 1.0)


def test_the_rate_of_every_step_is_the_schedules() -> None:
    model, seen = ConvMixer(8, 1, 3, 2, num_classes=4), []
    module = TrainingModule(model, Config(precision="fp32", lr=0.3), num_classes=4, steps_per_epoch=3, epochs=5)

    def remember() -> bool:
        seen.append([group["lr"] for group in module.optimizer.param_groups])
        return False

    fit(module, [_batch()] * 15, 15, remember)
    assert seen == [[rate_at_step("piecewise", step, 3, 5, 0.3)] * 2 for step in range(15)]


def test_measuring_the_speed_changes_nothing() -> None:
    torch.manual_seed(0)
    module = TrainingModule(
        ConvMixer(8, 1, 3, 2, num_classes=4), Config(precision="fp32"), num_classes=4, steps_per_epoch=9, epochs=1
    )
    before = {key: value.clone() for key, value in module.model.state_dict().items()}
    times = measure_speed(module, [_batch()] * 6, steps=4)
    assert len(times) == 4
    assert min(times) > 0
    assert module.steps_done == 0
    assert not module.optimizer.state
    assert all(torch.equal(before[key], value) for key, value in module.model.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_to_do(tmp_path: Path) -> None:
    config = Config(model="convmixer_16_2_p1_k3", workers=0, lr=1e30, clip_norm=0.0, schedule="constant")
    with pytest.raises(FloatingPointError, match="lower lr"):
        train("digits", config, out=tmp_path / "run")


def test_a_checkpoint_that_cannot_go_on_is_not_saved(tmp_path: Path) -> None:
    config = Config(
        model="convmixer_16_2_p1_k3", workers=0, lr=1e30, clip_norm=0.0, schedule="constant", checkpoint_seconds=1e-6
    )
    with pytest.raises(FloatingPointError, match="the previous checkpoint is kept"):
        train("digits", config, out=tmp_path / "run")
    state = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert state is not None
    assert all(value.isfinite().all() for value in state["module"]["model"].values())


@pytest.mark.parametrize("last", [3, 20])  # in an epoch, and at the end of one
def test_weights_that_the_last_update_spoilt_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    step = TrainingModule.training_step

    def spoil(module: TrainingModule, batch: Any, number: int) -> None:
        step(module, batch, number)
        if module.steps_done == last:
            next(module.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(TrainingModule, "training_step", spoil)
    config = Config(model="convmixer_8_1_p1_k3", workers=0, epochs=1, checkpoint_seconds=1e-6)
    with pytest.raises(FloatingPointError, match=f"weights are not finite after step {last}"):
        train("digits", config, out=tmp_path / "run")
    state = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert state is not None
    assert state["module"]["steps_done"] == last - 1
    assert not (tmp_path / "run" / "weights").exists()
