"""Training transforms and batch mixing: every policy on grey and colour, and timm's results if we follow timm."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from convmixer.config import Config
from convmixer.data.sampler import sample_seed, seed_everything
from convmixer.data.transforms import auto_augment, erase, erasing_boxes, eval_transform, mix, train_transform
from convmixer.errors import RequestError
from convmixer.preprocess import Preprocessing

PHOTO = Image.fromarray(load_sample_image("flower.jpg")).resize((48, 32))
SQUARE = PHOTO.resize((32, 32))
DIGIT = Image.fromarray((load_digits().images[0] * 15).astype(np.uint8))
GREY = Preprocessing(8, 1, (0.3,), (0.4,))
POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m9-n3", "augmix-m3-w3", "original-mstd0.5", "v0", "3a"]


def means(config: Config, image: Image.Image, p: Preprocessing, count: int = 60) -> torch.Tensor:
    """Return the mean of each of `count` random versions."""
    transform, values = train_transform(config, p), []
    for i in range(count):
        seed_everything(sample_seed(0, 0, i))
        result = transform(image)
        assert result.shape == (p.in_chans, p.img_size, p.img_size)
        assert result.dtype == torch.float32
        assert result.isfinite().all()
        values.append(result.mean())
    return torch.stack(values)


@pytest.mark.parametrize("policy", [*POLICIES, "torchvision-randaugment-2-12"])
@pytest.mark.parametrize("interpolation", ["random", "bilinear"])
def test_policies_work_on_grey_and_colour(policy: str, interpolation: str) -> None:
    config = Config(
        scale=(0.5, 1), ratio=(0.75, 1.33), hflip=0.5, vflip=0.5, color_jitter=0.2, auto_augment=policy,
        train_interpolation=interpolation, random_erasing=0.5,
    )  # fmt: skip
    for image, p in ((PHOTO, Preprocessing(32)), (DIGIT, GREY)):
        assert len(means(config, image, p).unique()) > 50  # versions differ


@pytest.mark.parametrize("policy", ["torchvision-randaugment-2-12", *POLICIES])
def test_transforms_reach_worker_processes(policy: str) -> None:
    transform = train_transform(Config(auto_augment=policy, hflip=0.5), Preprocessing(32))
    seed_everything(1)
    wanted = transform(SQUARE)
    seed_everything(1)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(SQUARE), wanted)


def test_unknown_policy_is_refused() -> None:
    for policy in ("rnd-m9", "torchvision-randaugment-2", "rand-x9"):
        with pytest.raises(RequestError, match="auto_augment"):
            train_transform(Config(auto_augment=policy), Preprocessing(32))


def test_randaugment_equals_torchvision() -> None:
    ours = auto_augment("torchvision-randaugment-2-12", "bicubic", Preprocessing(32))
    theirs = transforms.RandAugment(2, 12)
    for i in range(100):
        image = PHOTO if i % 2 else SQUARE  # a table per size
        torch.manual_seed(i)
        wanted = theirs(image)
        torch.manual_seed(i)
        assert np.array_equal(np.asarray(ours(image)), np.asarray(wanted))


def test_without_augmentation_train_equals_eval() -> None:
    p = Preprocessing(32)
    assert torch.equal(train_transform(Config(), p)(SQUARE), eval_transform(p)(SQUARE))


def test_whole_crop_of_another_size_is_resized() -> None:
    p = Preprocessing(16)
    torch.testing.assert_close(train_transform(Config(), p)(SQUARE), eval_transform(p)(SQUARE), rtol=0, atol=1e-6)


def test_probabilities() -> None:
    p, count = Preprocessing(32), 400
    plain = eval_transform(p)(SQUARE)
    for setting, wanted in (("hflip", plain.flip(2)), ("vflip", plain.flip(1))):
        transform, flipped = train_transform(Config(**{setting: 0.25}), p), 0
        for i in range(count):
            seed_everything(i)
            result = transform(SQUARE)
            assert torch.equal(result, wanted) or torch.equal(result, plain)
            flipped += torch.equal(result, wanted)
        assert 0.15 < flipped / count < 0.35
    config, generator = Config(random_erasing=0.25, erasing_mode="const"), torch.Generator().manual_seed(0)
    erased = erase(plain.repeat(count, 1, 1, 1), config, generator).flatten(1).mean(1) != plain.mean()
    assert 0.15 < erased.float().mean() < 0.35


@pytest.mark.parametrize("mode", ["pixel", "const", "rand"])
def test_erasing_modes(mode: str) -> None:
    plain = eval_transform(Preprocessing(32))(SQUARE)
    config = Config(random_erasing=1.0, erasing_mode=mode)
    result = erase(plain[None].clone(), config, torch.Generator().manual_seed(5))[0]
    changed = (result != plain).any(0)
    rows, columns = changed.any(1), changed.any(0)
    box = result[:, rows][:, :, columns]
    assert 0.01 < changed.float().mean() < 0.4
    assert changed.sum() > 0.95 * box[0].numel()  # one box
    spread = box.flatten(1).std(1)
    assert (spread > 0.5).all() if mode == "pixel" else (spread < 1e-6).all()
    assert mode != "const" or not box.any()


# mixing


def batch(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.arange(size) % 4


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.5, 0.5), (0.8, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("prob", [1.0, 0.5])
def test_mixing_equals_timm(mixup: float, cutmix: float, prob: float) -> None:
    config = Config(mixup=mixup, cutmix=cutmix, mixup_prob=prob, mixup_switch_prob=0.5, smoothing=0.1)
    timm = Mixup(mixup, cutmix, prob=prob, switch_prob=0.5, label_smoothing=0.1, num_classes=4)
    for seed in range(20):
        images, labels = batch()
        ours = mix(images, labels, 4, config, torch.Generator().manual_seed(seed))
        np.random.seed(int(torch.randint(2**32, (1,), generator=torch.Generator().manual_seed(seed))))
        wanted = timm(images.clone(), labels)
        torch.testing.assert_close(ours[0], wanted[0])
        torch.testing.assert_close(ours[1], wanted[1])
        torch.testing.assert_close(ours[1].sum(1), torch.ones(6))
        assert torch.equal(images, batch()[0])  # not changed


def test_weights_go_with_their_images_through_mixing() -> None:
    config = Config(mixup=0.5, cutmix=0.5, smoothing=0.1)
    for seed in range(4):
        images, labels = batch()
        weights = torch.tensor([0.0, 2.0, 1.0, 0.5, 0.5, 2.0])
        plain, weighted, heavy = (
            mix(images, labels, 4, config, torch.Generator().manual_seed(seed), w)
            for w in (None, torch.ones(6), weights)
        )
        assert torch.equal(plain[0], heavy[0])
        torch.testing.assert_close(plain[1], weighted[1])
        own = mixup_target(labels, 4, 1.0, 0.1)
        lam = (plain[1] - own.flip(0))[0, 0] / (own - own.flip(0))[0, 0]
        expected = lam * weights[:, None] * own + (1 - lam) * (weights[:, None] * own).flip(0)
        torch.testing.assert_close(heavy[1], expected)


def test_mixing_takes_odd_batches_and_depends_on_the_generator_alone() -> None:
    images, labels = batch(5)
    config = Config(mixup=0.5, cutmix=0.5)
    first, second = (mix(images, labels, 4, config, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    results = {mix(images, labels, 4, config, torch.Generator().manual_seed(s))[0][0].sum().item() for s in range(9)}
    assert len(results) > 5


def test_without_mixing_targets_are_smoothed_only() -> None:
    images, labels = batch()
    same, targets = mix(images, labels, 4, Config(smoothing=0.2), torch.Generator())
    assert same is images
    assert torch.allclose(targets[0], torch.tensor([0.85, 0.05, 0.05, 0.05]))


def test_erasing_depends_on_the_generator_alone() -> None:
    config, images = Config(random_erasing=0.5, erasing_mode="const"), batch()[0]
    first, second, other = (erase(images.clone(), config, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert erase(images, Config(), torch.Generator()) is images


def test_erased_boxes_follow_timms_distribution() -> None:
    """Moments of position, sides and their products over 20,000 images, within five standard errors."""
    count, shape = 20_000, (3, 24, 20)
    chosen, boxes = erasing_boxes(1.0, (count, *shape), np.random.default_rng(0))
    assert len(chosen) == count
    theirs = []
    image = torch.zeros(1, *shape)
    random.seed(0)
    for _ in range(count // 4):
        erased = RandomErasing(1.0, mode="rand", device="cpu")(image.clone())[0].abs().sum(0) > 0
        rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
        theirs.append((rows[0], columns[0], len(rows), len(columns)))
    ours, expected = boxes.astype(float), np.array(theirs, float)
    for moment in (lambda b: b, np.square, lambda b: b[:, 2:] * b[:, :2], lambda b: b[:, 2:3] * b[:, 3:]):
        a, b = moment(ours), moment(expected)
        error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
        assert (abs(a.mean(0) - b.mean(0)) < 5 * error).all()
    assert (ours[:, 0] + ours[:, 2] <= shape[1]).all()
    assert (ours[:, 1] + ours[:, 3] <= shape[2]).all()
