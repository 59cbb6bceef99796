"""Chooses the images to measure a model on, and matches the classes of data and model."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convmixer.data.argument import BUILT_IN, read_argument
from convmixer.data.datasets import DataSplits, ImageSet, load_data
from convmixer.data.options import Options, flag
from convmixer.data.splits import TEST_FRACTION
from convmixer.errors import RequestError
from convmixer.models.weights import class_names
from convmixer.preprocess import BITS
from convmixer.seal import is_sealed

SPLITS = ("test", "val", "train")  # the first split that exists is measured
MAX_BAD_FRACTION = 0.01
SYNSET = re.compile(r"n\d{8}([-_ .].*)?", re.DOTALL)  # a class folder of ImageNet, with or without words after it


@dataclass(frozen=True)
class EvaluationData:
    """Data to measure a model on.

    Args:
        splits: The splits: those of the training run if `own`, else those that the data come with.
        own: Whether the model was trained on these data.
        changed: Whether these are the training data, but have changed since.
        fraction: The share of the train split that the model was trained on.
    """

    splits: DataSplits
    own: bool
    changed: bool = False
    fraction: float = 1.0

    @property
    def there(self) -> list[str]:
        """The names of the splits that exist, in the order of `SPLITS`."""
        return [name for name in SPLITS if getattr(self.splits, name) is not None]

    def choose(self, split: str | None) -> str:
        """Return the split to measure on.

        Args:
            split: The split that the user chose. None: test; or if these are not the training data, the first of
                test, val and train that exists.
        """
        return split or (SPLITS if self.own else self.there)[0]

    def said(self, split: str) -> list[str]:
        """Return a line for the user in two cases, else none.

        Either the data are not the training data and the split is not their test split; or the model was trained on
        only a part of the split.
        """
        if self.own and split == "train" and self.fraction < 1:
            used = f"--fraction {self.fraction:g}"
            return [f"the model was trained on a part of this split ({used}); all of its images are measured"]
        if self.own or split == "test":
            return []
        counts = [f"{name} {len(self.pick(name))}" for name in self.there]
        if len(counts) == 1:
            images = len(self.pick(split))
            return [f"these are not the training data and have no test split: all {images} images are measured"]
        return [f"split {split} is measured, of {', '.join(counts)} images; --split chooses another"]

    def pick(self, split: str) -> ImageSet:
        """Return a split of the data.

        Raises:
            RequestError: The data have no such split.
        """
        images: ImageSet | None = getattr(self.splits, split)
        if images is None:
            there = ", ".join(reversed(self.there))
            raise RequestError(f"{self.splits.name} has no {split} split: choose --split from {there}")
        return images

    def training_images(self) -> ImageSet:
        """Return the train split, or if there is none, the split that exists."""
        return self.pick("train" if self.splits.train is not None else self.choose(None))


def find_data(
    data: str | None, metadata: dict[str, Any], weights: str | Path, options: Options | None = None
) -> EvaluationData:
    """Return the data to measure on: those that the user named, or those that the weights were trained on.

    The training data are split as in training; other data keep their own splits. A path in the weights is opened only
    if this user trained them on this machine, because other people's weights could name any of this user's folders.
    Built-in data are harmless, so all weights may name them.

    Args:
        data: The data argument of the user, or None.
        metadata: Metadata of the weights; its entry "data" holds "spec", "seal", "checksum" and the settings of the
            split.
        weights: Name of the weights, for errors.
        options: What the user said about the columns, folders and groups of `data`.

    Raises:
        RequestError: The data cannot be loaded; training read them with other `options`; or the user named no data
            and those named in the weights must not be opened.
    """
    options = (options or Options()).absolute()
    trained_on = metadata.get("data")
    trained_on = trained_on if isinstance(trained_on, dict) else {}
    spec, checksum = trained_on.get("spec"), trained_on.get("checksum")
    fraction = _share(trained_on.get("fraction"), 1.0)
    if data is None:
        _check_trusted(spec, trained_on, weights)
        if options.given():
            raise RequestError(f"{_flags(options)}: name the data too; the training data are read as in training")
        splits = _load(str(spec), trained_on, _known_options(trained_on), recorded=True)
        return EvaluationData(splits, True, checksum not in (None, splits.checksum), fraction)
    if spec in (data, read_argument(data).spec):
        splits = _load(data, trained_on, _agreed(trained_on, options))
        return EvaluationData(splits, True, checksum not in (None, splits.checksum), fraction)
    splits = _load(data, trained_on, options, hold_out=False)
    if splits.checksum == checksum:  # the training data at another path
        return EvaluationData(_load(data, trained_on, _agreed(trained_on, options)), True, fraction=fraction)
    return EvaluationData(splits, False)


def _check_trusted(spec: object, trained_on: dict[str, Any], weights: str | Path) -> None:
    if spec is None:
        raise RequestError(f"{weights} does not say what it was trained on: name the data, e.g. cifar10 or a folder")
    if spec not in BUILT_IN and not is_sealed(str(spec), trained_on.get("seal")):
        raise RequestError(
            f"{weights} says that it was trained on {str(spec)[:200]!r}, but you did not train it here, so "
            "convmixer does not open these data by itself: name the data"
        )


def _load(
    spec: str,
    trained_on: dict[str, Any],
    options: Options,
    hold_out: bool = True,
    recorded: bool = False,
) -> DataSplits:
    seed = trained_on.get("seed")
    return load_data(
        spec,
        val_fraction=_share(trained_on.get("val_fraction"), 0.1),
        test_fraction=_share(trained_on.get("test_fraction"), TEST_FRACTION),
        seed=seed if isinstance(seed, int) and seed >= 0 else 0,
        max_bad_fraction=_share(trained_on.get("max_bad_fraction"), MAX_BAD_FRACTION),
        recorded=recorded,
        hold_out=hold_out,
        options=options,
        bits=bits if (bits := trained_on.get("bits")) in BITS else None,
    )


def _agreed(trained_on: dict[str, Any], options: Options) -> Options:
    """Return the options to read the training data with: those of training, and those of the user that agree.

    Raises:
        RequestError: The user's options contradict those of training.
    """
    known, said = _known_options(trained_on).given(), options.given()
    mine = is_sealed(str(trained_on.get("spec")), trained_on.get("seal"))
    fixed = known.keys() - {"image_root"} | ({"group", "split_column"} if mine else set())
    if other := next((name for name in fixed & said.keys() if said[name] != known.get(name)), None):
        then = f"with {flag(other)} {known[other]}" if other in known else f"without {flag(other)}"
        raise RequestError(f"{flag(other)} {said[other]}: training read these data {then}; leave it out")
    return Options(**known | said)


def _flags(options: Options) -> str:
    return " ".join(f"{flag(name)} {value}" for name, value in options.given().items())


def _known_options(trained_on: dict[str, Any]) -> Options:
    """Return the options with which training read its data.

    If another user trained the weights, there are none, because an untrusted regular expression might run forever.
    """
    known = trained_on.get("options")
    trusted = is_sealed(str(trained_on.get("spec")), trained_on.get("seal"))
    return Options.of(known) if isinstance(known, dict) and trusted else Options()


def _share(value: Any, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) and 0 <= value <= 1 else default


def sample(images: ImageSet, limit: int | None, seed: int = 0) -> ImageSet:
    """Return a random subset of `limit` images in their order, or all of them."""
    if limit is None or limit >= len(images):
        return images
    return images.subset(np.sort(np.random.default_rng(seed).permutation(len(images))[:limit]))


def unreadable(images: ImageSet) -> list[str]:
    """Return a line that counts the images that could not be decoded, or nothing."""
    failed = images.failed
    return [f"{len(failed)} images could not be decoded and are left out: {', '.join(failed[:3])}"] if failed else []


def match_classes(data: Sequence[str], model: Sequence[str]) -> tuple[torch.Tensor, list[str]]:
    """Return the index of the model's output for each class of the data.

    Classes are matched by name, after Unicode (NFC) normalisation, because a Mac writes some names differently. If a
    model has no names (they are "0", "1", ...), its classes are assumed to be in the order of the data, as long as
    both have the same number of classes. ImageNet's folders (n01440764, n02085620-Chihuahua) are matched to the names
    of its 1000 classes.

    Args:
        data: Class names of the data, by label.
        model: Class names of the model, by output.

    Returns:
        The indices, int64 (classes of the data,), and a line for each assumption.

    Raises:
        RequestError: The model lacks a class, or two classes have the same name.
    """
    wanted, known = [_plain(name) for name in data], [_plain(name) for name in model]
    _check_unambiguous(wanted, "the data")
    synsets = _imagenet_synsets(known) if all(SYNSET.fullmatch(name) for name in wanted) else []
    if synsets:
        short = [name[:9] for name in wanted]
        _check_unambiguous(short, "the data")
        return _index(short, synsets, model), ["ImageNet's folder names are matched to its 1000 classes"]
    if _is_nameless(known) and len(data) == len(model):
        line = "the weights have no class names: they are assumed to be in the order of the data"
        return torch.arange(len(data)), [] if wanted == known else [line]
    _check_unambiguous([name for name in known if name in set(wanted)], "the model")
    return _index(wanted, known, model), []


def _index(wanted: Sequence[str], known: Sequence[str], model: Sequence[str]) -> torch.Tensor:
    place = {name: number for number, name in enumerate(known)}
    missing = [name for name in wanted if name not in place]
    if missing:
        raise RequestError(
            f"the model does not know {len(missing)} of the {len(wanted)} classes of the data: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; it knows {', '.join(model[:5])}, ..."
        )
    return torch.tensor([place[name] for name in wanted])


def _check_unambiguous(names: Sequence[str], whose: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise RequestError(f"two classes of {whose} have the same name, {twice[0]!r}: rename one")


def _imagenet_synsets(known: Sequence[str]) -> list[str]:
    """Return ImageNet's synsets if a model has its 1000 classes, by a common naming scheme; else []."""
    if len(known) != 1000:
        return []
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    synsets = list(info.label_names())
    words = [info.label_descriptions(detailed) for detailed in (False, True)]
    return synsets if list(known) in [synsets, list(class_names(1000)), *words] else []


def _is_nameless(classes: Sequence[str]) -> bool:
    return list(classes) == [str(i) for i in range(len(classes))]


def _plain(name: object) -> str:
    return unicodedata.normalize("NFC", str(name))
