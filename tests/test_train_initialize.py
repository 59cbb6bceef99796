"""Initial weights and augmentation of short runs: white responses, zero logits, alternating flips, padded crops."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from convmixer.config import Config
from convmixer.data.datasets import load_data
from convmixer.data.loader import train_loader
from convmixer.data.sampler import is_flipped
from convmixer.data.transforms import train_transform
from convmixer.errors import RequestError
from convmixer.models.convmixer import ConvMixer
from convmixer.preprocess import Preprocessing
from convmixer.train.initialize import whiten_stem
from convmixer.train.setup import prepare

SMALL = {"model": "convmixer_16_1_p2_k3", "workers": 0, "precision": "fp32"}


def correlated_images() -> torch.Tensor:
    noise = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return nn.functional.avg_pool2d(noise, 3, 1, 1) + 0.1 * noise[:, :1]


def test_the_whitened_filters_answer_to_patches_with_white_noise() -> None:
    model = ConvMixer(40, 1, 3, 2, num_classes=2)
    untouched = model.stem[0].weight[24:].detach().clone()
    images = correlated_images()
    whiten_stem(model, [images[:40], images[40:]])
    conv = model.stem[0]
    answers = nn.functional.conv2d(images, conv.weight, stride=2)[:, :24].transpose(0, 1).flatten(1)
    moments = answers @ answers.T / answers.shape[1]
    torch.testing.assert_close(
        moments[::2, ::2], torch.eye(12), rtol=0, atol=0.06
    )  # WHITEN_EPS takes 5% off the weakest
    torch.testing.assert_close(answers[::2], -answers[1::2])
    assert torch.equal(conv.weight[24:], untouched)


def test_a_narrow_stem_gets_the_strongest_filters() -> None:
    model = ConvMixer(6, 1, 3, 2, num_classes=2)
    images = correlated_images()
    whiten_stem(model, [images])
    scale = model.stem[0].weight.flatten(1).norm(dim=1)  # one over the root of the eigenvalue
    assert torch.equal(scale[::2], scale[::2].sort().values)


def test_settings_reach_the_new_model_and_its_seed_decides() -> None:
    config = Config(**SMALL, stem_init="whiten", head_init="zeros")  # type: ignore[arg-type]
    first, second = (prepare("digits", config).model for _ in range(2))
    plain = prepare("digits", Config(**SMALL)).model  # type: ignore[arg-type]
    assert torch.equal(first.stem[0].weight, second.stem[0].weight)  # type: ignore[index, union-attr]
    assert not torch.equal(first.stem[0].weight, plain.stem[0].weight)  # type: ignore[index, union-attr]
    assert not first.eval()(torch.randn(2, 1, 8, 8)).any()


def test_what_cannot_be_whitened_is_refused() -> None:
    with pytest.raises(RequestError, match="without padding"):
        whiten_stem(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), [])
    with pytest.raises(RequestError, match="would overwrite the stem"):
        prepare("digits", Config(weights="convmixer_256_8.cifar10", stem_init="whiten"))


def test_every_image_is_flipped_in_every_other_epoch() -> None:
    flips = np.array([[is_flipped(3, epoch, index) for index in range(400)] for epoch in range(4)])
    assert (flips[0] == flips[2]).all()
    assert (flips[0] != flips[1]).all()
    assert 150 < flips[0].sum() < 250
    assert (flips[0] != [is_flipped(4, 0, index) for index in range(400)]).any()


def test_the_loader_alternates_the_flips() -> None:
    images = load_data("digits", val_fraction=0.1, seed=0, max_bad_fraction=0.0).train
    assert images is not None
    images = images.subset(np.arange(32))
    config = Config(hflip=0.5, hflip_mode="alternate", model="x")
    transform = train_transform(config, Preprocessing(8, 1, (0.0,), (1.0,)))
    loader = train_loader(images, transform, batch_size=1, seed=0, alternate_flip=True)
    batches = iter(loader)
    seen: list[set[bytes]] = [{next(batches)[0].numpy().tobytes() for _ in range(32)} for _ in range(3)]
    assert seen[0] == seen[2]
    assert not seen[0] & seen[1]


def test_alternating_flips_ask_for_half() -> None:
    with pytest.raises(RequestError, match="set hflip to"):
        Config(hflip_mode="alternate")


def test_a_padded_crop_moves_the_image_and_mirrors_its_border() -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    transform = train_transform(Config(pad_crop=2), Preprocessing(8, 1, (0.0,), (1.0,)))
    padded = np.pad(pixels, 2, mode="reflect") / 255
    windows = [padded[i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    torch.manual_seed(0)
    found = set()
    for _ in range(200):
        out = transform(Image.fromarray(pixels))[0].numpy()
        (match,) = (i for i, window in enumerate(windows) if np.allclose(out, window, atol=1e-6))
        found.add(match)
    assert found == set(range(25))
    with pytest.raises(RequestError, match="pad_crop must be below"):
        train_transform(Config(pad_crop=8), Preprocessing(8, 1, (0.0,), (1.0,)))
