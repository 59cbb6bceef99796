"""Augmentation on the device, tried on the CPU: the same operations as with PIL, the same distribution, keyed."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data.auto_augment as timm_ops
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from convmixer import records
from convmixer.config import Config
from convmixer.data import batch_augment, batch_ops, policies
from convmixer.data.batch_augment import Augmentation
from convmixer.data.datasets import load_data
from convmixer.data.on_device import CroppedLoader, DeviceLoader, load, why_not_kept
from convmixer.data.policies import Draws, Kind, Layer
from convmixer.data.sampler import seed_everything
from convmixer.data.transforms import preprocessing_of, train_transform
from convmixer.errors import RequestError
from convmixer.preprocess import Preprocessing
from convmixer.recipes import list_recipes, load_recipe
from convmixer.train.run import train
from convmixer.train.setup import prepare
from waiting import NoWaiting

SIDE = 24
P = Preprocessing(img_size=SIDE, in_chans=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def _picture(seed: int = 0) -> Image.Image:
    """Return a smooth picture: a blurred one shows sampling, and has no ties."""
    noise = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, 1, 2) * 300 + 128
    return Image.fromarray(smooth[0].clamp(0, 255).byte().permute(1, 2, 0).numpy())


def _tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


def _away(found: torch.Tensor, expected: Image.Image) -> torch.Tensor:
    return (found.int() - _tensor(expected).int()).abs()


def _applied(name: str, value: float, sampling: int, fill: tuple[int, ...]) -> torch.Tensor:
    layer = Layer(
        np.array([policies.NUMBERS[name]]), np.array([value]), np.array([sampling]), Kind((name,), (sampling,))
    )
    numbers = layer.numbers(SIDE)
    return layer.kind.apply(
        _tensor(_picture()), torch.from_numpy(numbers), torch.tensor(fill, dtype=torch.uint8), numbers
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", policies.TORCHVISION)
def test_torchvisions_operations(name: str, sign: int) -> None:
    """Equal to the byte: its geometric operations sample the nearest pixel."""
    strength = {"Shear": 0.2, "Translate": 5.0, "Rotate": 17.0, "Posterize": 5.0, "Solarize": 153.0}
    magnitude = next((v for key, v in strength.items() if name.startswith(key)), 0.36)
    magnitude *= sign if name in policies.SIGNED else 1
    expected = _apply_op(_picture(), name, magnitude, InterpolationMode.NEAREST, None)
    value = {"Translate": -magnitude}.get(name[:-1], 1 + magnitude if name in policies.BLENDS else magnitude)
    assert _away(_applied(name, value, batch_ops.NEAREST, (0, 0, 0)), expected).max() == 0


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", policies.TIMM)
def test_timms_operations(monkeypatch: pytest.MonkeyPatch, name: str, sign: int) -> None:
    """Equal to the byte, except for sampling: within one level."""
    theirs = next(
        n for n in timm_ops._RAND_INCREASING_TRANSFORMS if n.removesuffix("Increasing") in (name, f"{name}Rel")
    )
    monkeypatch.setattr(timm_ops, "_randomly_negate", lambda v: v * sign)
    level, fill = 6.3, (102, 128, 153)
    level_fn: Any = timm_ops.LEVEL_TO_ARG[theirs]
    arguments = level_fn(level, {"translate_pct": 0.45}) if level_fn else ()
    extra = {"fillcolor": fill, "resample": Image.Resampling.BICUBIC} if name in policies.GEOMETRIC else {}
    expected = timm_ops.NAME_TO_OP[theirs](_picture(), *arguments, **extra)
    value = policies._timm_values(name, np.array([level / 10]), np.array([float(sign)]), SIDE)[0]
    away = _away(_applied(name, value, batch_ops.BICUBIC, fill), expected)
    assert away.max() <= (1 if name in policies.GEOMETRIC else 0)


POLICIES: dict[str, dict[str, Any]] = {
    "torchvision": {"auto_augment": "torchvision-randaugment-2-12", "hflip": 0.5},
    "timm": {"auto_augment": "rand-m9-mstd0.5-inc1", "train_interpolation": "random"},
    "crop": {"scale": (0.5, 1.0), "ratio": (0.75, 1.3333), "train_interpolation": "random"},
    "pad": {"pad_crop": 4, "vflip": 0.5},
    "jitter": {"color_jitter": 0.4},
}


@pytest.mark.parametrize("name", list(POLICIES))
def test_images_follow_the_same_distribution_as_on_the_cpu(name: str) -> None:
    """Mean and standard deviation of every pixel over 1,500 versions of one picture, within five standard errors."""
    config, count, picture = Config(**POLICIES[name]), 1500, _picture(3)
    transform, theirs = train_transform(config, P), []
    for i in range(count):
        seed_everything(i)
        theirs.append(transform(picture))
    augmentation = Augmentation(config, P, torch.device("cpu"))
    drawn = augmentation.draw(0, np.arange(count))
    ours = augmentation.apply(_tensor(picture).expand(count, -1, -1, -1), torch.from_numpy(drawn), drawn)
    expected = torch.stack(theirs)
    for moment in (lambda x: x, torch.square):
        a, b = moment(ours), moment(expected)
        error = ((a.var(0) + b.var(0)) / count).sqrt() + 0.01
        z = (a.mean(0) - b.mean(0)).abs() / error
        assert z.max() < 5.5
        assert z.mean() < 1.6


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_fixed_sequence_of_operations_gives_the_same_images(name: str) -> None:
    """As for a CUDA graph: every operation on all images, chosen afterwards."""
    augmentation = Augmentation(Config(**POLICIES[name]), P, torch.device("cpu"))
    images = torch.cat([_tensor(_picture(seed)) for seed in range(40)])
    drawn = augmentation.draw(0, np.arange(40))
    numbers = torch.from_numpy(drawn)
    assert torch.equal(augmentation.apply(images, numbers, drawn), augmentation.apply(images, numbers))


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_fixed_sequence_never_waits_for_a_device(name: str) -> None:
    """On tensors without values: what depends on a value would fail, what copies to or from the host is refused."""
    augmentation = Augmentation(Config(**POLICIES[name]), P, torch.device("meta"))
    numbers = torch.from_numpy(augmentation.draw(0, np.arange(8))).to("meta")
    images = torch.empty(8, 3, SIDE, SIDE, dtype=torch.uint8, device="meta")
    with NoWaiting():
        made = augmentation.apply(images, numbers)
    assert (made.shape, made.dtype) == (images.shape, torch.float32)


def test_draws_are_keyed_by_seed_epoch_and_index() -> None:
    together = Draws(3, 1, np.arange(1000)).uniform()
    assert np.array_equal(Draws(3, 1, np.arange(500, 510)).uniform(), together[500:510])
    for other in (Draws(4, 1, np.arange(1000)), Draws(3, 2, np.arange(1000))):
        assert not np.intersect1d(other.uniform(), together).size
    assert abs(together.mean() - 0.5) < 0.05
    assert abs(np.corrcoef(together[1:], together[:-1])[0, 1]) < 0.1


def test_a_loader_goes_on_where_another_stopped() -> None:
    data = load_data("digits", val_fraction=0.0, seed=0, max_bad_fraction=0.0)
    config = Config(auto_augment="torchvision-randaugment-2-9", hflip=0.5)
    assert data.train is not None
    p = preprocessing_of(data, config)
    images = load(data.train, p, torch.device("cpu"))
    assert images is not None
    whole, later = (
        iter(DeviceLoader(images, data.train.labels, config, p, batch_size=64, start_step=step)) for step in (0, 2)
    )
    batches = [next(whole) for _ in range(3)]
    again = next(later)
    assert torch.equal(batches[2][0], again[0])
    assert torch.equal(batches[2][1], again[1])
    assert batches[0][0].shape == (64, p.in_chans, p.img_size, p.img_size)


def test_what_cannot_be_there_says_why() -> None:
    data = load_data("digits", val_fraction=0.0, seed=0, max_bad_fraction=0.0)
    assert data.train is not None
    p, cpu = preprocessing_of(data, Config()), torch.device("cpu")
    assert why_not_kept(p, data.train, cpu) is None
    larger = preprocessing_of(data, Config(img_size=32))
    assert "32 x 32" in str(why_not_kept(larger, data.train, cpu))
    assert "augmix" in str(batch_augment.why_not(Config(auto_augment="augmix-m3-w3"), cpu, cropped=True))
    nearest = Config(scale=(0.5, 1.0), train_interpolation="nearest")
    assert "nearest" in str(batch_augment.why_not(nearest, cpu, cropped=False))
    assert batch_augment.why_not(nearest, cpu, cropped=True) is None


@pytest.mark.parametrize("recipe", list_recipes())
def test_every_recipe_is_augmented_on_the_device(recipe: str) -> None:
    assert batch_augment.why_not(load_recipe(recipe), torch.device("cpu"), cropped=True) is None


SETTINGS: dict[str, Any] = {
    "model": "convmixer_16_2_p1_k3",
    "epochs": 5,
    "workers": 0,
    "batch_size": 64,
    "lr": 0.03,
    "draw": False,
}


def test_a_run_augments_where_it_is_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(**SETTINGS, augment_on="device", auto_augment="torchvision-randaugment-1-3", scale=(0.8, 1.0))
    train("digits", config, tmp_path / "run")
    (record,) = records.read(tmp_path / "run" / "record.jsonl")
    assert record.config["augment_on"] == "device"
    assert "keeps all" in record.results["augmentation"]
    assert record.results["augmentation"] in capsys.readouterr().out
    assert record.results["test_top1"] > 30
    refused = Config(**SETTINGS, augment_on="device", auto_augment="augmix-m3-w3")
    with pytest.raises(RequestError, match="augmix-m3-w3 has operations"):
        train("digits", refused, tmp_path / "other")
    job = prepare("digits", Config(**SETTINGS))
    assert job.config.augment_on == "cpu"


def test_larger_images_are_cropped_before_and_augmented_on_the_device() -> None:
    config = Config(
        **SETTINGS, img_size=12, augment_on="device", auto_augment="rand-m3-mstd0.5-inc1", scale=(0.8, 1.0), hflip=0.5
    )
    job = prepare("digits", config)
    assert job.config.augment_on == "after-crop"
    assert "after decoding and crop on the CPU" in job.augmentation
    assert "12 x 12" in job.augmentation
    loader = job.train_loader(start_step=1)
    assert isinstance(loader, CroppedLoader)
    images, labels = next(iter(loader))
    assert (images.shape, images.dtype) == ((64, 1, 12, 12), torch.float32)
    again = iter(job.train_loader())
    next(again)
    assert torch.equal(next(again)[0], images)
    plain = next(iter(prepare("digits", dataclasses.replace(config, augment_on="cpu")).train_loader(start_step=1)))
    assert torch.equal(plain[1], labels)
    assert not torch.equal(plain[0], images)


def test_crops_before_the_device_are_those_of_the_cpu() -> None:
    """Without further augmentation both paths give the same images."""
    config = Config(**SETTINGS, img_size=12, scale=(0.5, 1.0))
    on_cpu, after = (
        next(iter(prepare("digits", dataclasses.replace(config, augment_on=where)).train_loader()))[0]
        for where in ("cpu", "after-crop")
    )
    torch.testing.assert_close(on_cpu, after)


def test_a_resumed_run_does_not_move_its_augmentation() -> None:
    config = Config(**SETTINGS, img_size=12, augment_on="device")
    p = prepare("digits", config).preprocessing
    with pytest.raises(RequestError, match="kept its images on the device"):
        prepare("digits", config, preprocessing=p)
