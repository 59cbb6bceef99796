"""Recipes: complete, loadable by name, with the settings that the authors' scripts and issues state."""

import pytest

from convmixer.config import Config, difference
from convmixer.errors import RequestError
from convmixer.models.registry import model_args
from convmixer.recipes import list_recipes, load_recipe


def test_every_recipe_loads_and_names_a_model_that_exists() -> None:
    names = list_recipes()
    assert {"digits", "authors-cifar10", "paper-cifar10", "paper-imagenet", "paper-imagenet-300", "finetune"} == {
        *names
    }
    for name in names:
        config = load_recipe(name)
        assert config.model == "auto" or model_args(config.model)


def test_settings_of_the_authors_cifar_script() -> None:
    config = load_recipe("authors-cifar10")
    assert (config.model, config.epochs, config.batch_size) == ("convmixer_256_8_p2_k5", 25, 512)
    assert (config.lr, config.weight_decay, config.eps, config.clip_norm) == (0.05, 0.005, 1e-8, 0.0)
    assert config.decay_norm_and_bias
    assert config.auto_augment == "torchvision-randaugment-2-12"
    assert (config.random_erasing, config.color_jitter, config.scale, config.hflip) == (0, 0, (1, 1), 0.5)
    assert config.val_fraction == 0


def test_settings_of_the_paper() -> None:
    cifar, imagenet = load_recipe("paper-cifar10"), load_recipe("paper-imagenet")
    for config in (cifar, imagenet):
        assert (config.lr, config.eps, config.clip_norm, config.smoothing) == (0.01, 1e-3, 1.0, 0.1)
        assert (config.mixup, config.cutmix, config.random_erasing, config.erasing_mode) == (0.5, 0.5, 0.25, "pixel")
        assert config.auto_augment == "rand-m9-mstd0.5-inc1"
        assert not config.decay_norm_and_bias
    assert (cifar.epochs, cifar.batch_size, cifar.weight_decay, cifar.scale) == (200, 64, 0.01, (0.75, 1.0))
    assert (imagenet.epochs, imagenet.batch_size, imagenet.weight_decay) == (150, 640, 2e-5)
    assert {*difference(imagenet, load_recipe("paper-imagenet-300"))} == {"model", "epochs"}


def test_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean 'digits'"):
        load_recipe("digit")
    assert load_recipe("digits") != Config()
