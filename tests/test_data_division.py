"""Ranks and loader workers share the images of shards: together they use all, and none twice.

Images have numbers, whichever shard they are in, and each step takes its part of one permutation of all. So shards
need no counts that ranks could divide, and any number of ranks and workers reads the same batches.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from convmixer.data.find import find
from convmixer.data.images import ImageSet
from convmixer.data.loader import eval_loader, train_loader
from data_sets import write_tar

COUNTS = (31, 1, 17, 48)  # of four shards: 97 images, a prime
BATCH = 12  # of all ranks together
STEPS = sum(COUNTS) // BATCH


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """The images of four shards, each labelled with its own number."""
    folder, first = tmp_path_factory.mktemp("shards"), 0
    for number, count in enumerate(COUNTS):
        write_tar(folder / f"{number}.tar", range(first, first + count))
        first += count
    source, _ = find(str(folder)).splits["train"]
    return ImageSet(source, np.arange(len(source)), [str(i) for i in range(len(source))])


def trained_on(images: ImageSet, rank: int, world: int, workers: int, epoch: int) -> list[list[int]]:
    settings = {"batch_size": BATCH // world, "seed": 3, "start_step": epoch * STEPS, "workers": workers}
    batches = iter(train_loader(images, as_tensor, rank=rank, world=world, **settings))
    return [next(batches)[1].tolist() for _ in range(STEPS)]


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_takes_no_image_twice_in_an_epoch(images: ImageSet, world: int, workers: int) -> None:
    alone = trained_on(images, 0, 1, 0, epoch=1)
    parts = [trained_on(images, rank, world, workers, epoch=1) for rank in range(world)]
    together = [[number for part in step for number in part] for step in zip(*parts, strict=True)]
    assert together == alone
    used = [number for step in together for number in step]
    assert len(set(used)) == len(used) == STEPS * BATCH  # 96 of 97: the last step of an epoch is a whole one


def test_what_one_epoch_leaves_out_is_in_the_next(images: ImageSet) -> None:
    left_out = []
    for epoch in range(3):
        used = {n for rank in range(2) for step in trained_on(images, rank, 2, 0, epoch) for n in step}
        left_out.append(set(range(len(images))) - used)
    assert all(len(numbers) == 1 for numbers in left_out)
    assert len(set.union(*left_out)) > 1


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_reads_every_image_once(images: ImageSet, world: int, workers: int) -> None:
    loaders = [eval_loader(images, as_tensor, 5, workers, rank, world) for rank in range(world)]
    read = [number for loader in loaders for _, labels in loader for number in labels.tolist()]
    assert sorted(read) == list(range(len(images)))
