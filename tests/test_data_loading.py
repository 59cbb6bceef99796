"""Loaders: exact order and augmentation for any number of workers and processes, resume, reading all once."""

import io
import multiprocessing
import os
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from convmixer.config import Config
from convmixer.data.datasets import DataSplits, ImageSet, load_data
from convmixer.data.loader import eval_loader, train_loader
from convmixer.data.sources import Arrays
from convmixer.data.transforms import eval_transform, preprocessing_of, train_transform
from convmixer.errors import RequestError
from convmixer.preprocess import ImageError

CONFIG = Config(scale=(0.5, 1.0), hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.2)


@pytest.fixture(scope="module")
def digits() -> DataSplits:
    return load_data("digits", val_fraction=0.1, seed=0, max_bad_fraction=0)


def batches(digits: DataSplits, count: int, **options: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    assert digits.train is not None
    transform = train_transform(CONFIG, preprocessing_of(digits, CONFIG))
    given = {"batch_size": 32, "seed": 3, **options}
    loader = train_loader(digits.train, transform, **given)  # type: ignore[arg-type]
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def same(a: list[tuple[torch.Tensor, torch.Tensor]], b: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(s, t) for (x, s), (y, t) in zip(a, b, strict=True)
    )


def test_batches_are_equal_for_any_number_of_workers(digits: DataSplits) -> None:
    reference = batches(digits, 42)  # 40 steps make an epoch
    for workers in (1, 2):
        assert same(reference, batches(digits, 42, workers=workers))


def test_another_seed_and_another_epoch_give_other_batches(digits: DataSplits) -> None:
    first = batches(digits, 1)
    assert not same(first, batches(digits, 1, seed=4))
    assert not same(first, batches(digits, 1, start_step=40))


def test_starting_in_mid_epoch_continues_exactly(digits: DataSplits) -> None:
    whole = batches(digits, 43)
    assert same(whole[37:], batches(digits, 6, start_step=37, workers=1))


def test_processes_share_the_batches_of_one(digits: DataSplits) -> None:
    whole = batches(digits, 3)
    parts = [batches(digits, 3, batch_size=16, rank=rank, world=2) for rank in range(2)]
    for step in range(3):
        assert torch.equal(whole[step][0], torch.cat([part[step][0] for part in parts]))
        assert torch.equal(whole[step][1], torch.cat([part[step][1] for part in parts]))


def test_an_epoch_reads_every_image_at_most_once(digits: DataSplits) -> None:
    assert digits.train is not None
    loader = train_loader(digits.train, torch.zeros, batch_size=64, seed=0)  # type: ignore[arg-type]
    sampler = loader.batch_sampler
    keys = [key for step in range(sampler.steps_per_epoch) for key in sampler.batch(step)]  # type: ignore[union-attr]
    assert len(set(keys)) == len(keys) == len(digits.train) // 64 * 64


def test_a_set_smaller_than_a_batch_is_refused(digits: DataSplits) -> None:
    with pytest.raises(RequestError, match="set batch_size to 1293 or less"):
        batches(digits, 1, batch_size=2000)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_all_once_in_order(digits: DataSplits, workers: int) -> None:
    assert digits.test is not None
    transform = eval_transform(preprocessing_of(digits, CONFIG))
    labels = torch.cat([y for _, y in eval_loader(digits.test, transform, 50, workers)])
    assert labels.tolist() == digits.test.labels.tolist()
    ranks = [torch.cat([y for _, y in eval_loader(digits.test, transform, 50, 0, r, 2)]) for r in range(2)]
    assert torch.equal(torch.stack(ranks, 1).flatten(), labels)


def test_waiting_is_counted(digits: DataSplits) -> None:
    assert digits.test is not None
    loader = eval_loader(digits.test, eval_transform(preprocessing_of(digits, CONFIG)), 50)
    list(loader)
    assert 0 < loader.waited_seconds < 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the workers do not compete with the training")
def test_workers_give_way_to_the_training(digits: DataSplits) -> None:
    before = os.nice(0)

    def niceness(_: object) -> torch.Tensor:
        return torch.tensor(os.nice(0))

    assert digits.train is not None
    images, _ = next(iter(train_loader(digits.train, niceness, batch_size=4, seed=0, workers=1)))
    assert images.tolist() == [19] * 4
    assert os.nice(0) == before


class Damaged(Arrays):
    """Images of which the first cannot be decoded."""

    def image(self, index: int, *how: int) -> Image.Image:
        if index == 0:
            raise ImageError("damaged")
        return super().image(index, *how)


@pytest.mark.timeout(60)
def test_a_worker_waits_for_no_lock_that_it_was_forked_with(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A worker names an unreadable image while a thread of the training draws the progress, through the same lock."""
    drawing = threading.Lock()

    class Progress(io.StringIO):
        def write(self, text: str) -> int:
            with drawing:
                return super().write(text)

    source = Damaged(np.zeros((4, 8, 8), np.uint8), ["one", "two", "three", "four"])
    images = ImageSet(source, np.zeros(4), ["x", "y"], in_chans=1, max_bad=1)
    loader = eval_loader(images, lambda _: torch.zeros(1), batch_size=4, workers=1)
    monkeypatch.setattr(sys, "stderr", Progress())
    with drawing:
        batch, _ = next(iter(loader))
    assert len(batch) == 3
    assert "unreadable image left out: one: damaged" in capfd.readouterr().err


def test_a_closed_loader_leaves_no_worker_behind(digits: DataSplits) -> None:
    assert digits.train is not None
    before = set(multiprocessing.active_children())
    transform = train_transform(CONFIG, preprocessing_of(digits, CONFIG))
    loader = train_loader(digits.train, transform, batch_size=32, seed=3, workers=2)
    iterator = iter(loader)  # still referred to, as a traceback may do
    next(iterator)
    assert len(set(multiprocessing.active_children()) - before) == 2
    loader.close()
    assert set(multiprocessing.active_children()) <= before
    loader.close()  # a second time is no error
