"""Where batches are made: what is tried while training waits, what is kept, and that batches stay the same."""

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from convmixer.config import override
from convmixer.data import pace as pacing
from convmixer.data.images import ImageSet
from convmixer.data.loader import eval_loader, train_loader
from convmixer.data.pace import Pace, Place, places
from convmixer.data.sources import Arrays
from convmixer.recipes import load_recipe
from convmixer.train.run import train

PHOTOGRAPHS = {n: Image.fromarray(load_sample_image(f)) for n, f in (("a", "china.jpg"), ("b", "flower.jpg"))}
LOW, OWN, HERE = Place(2, yields=True), Place(2), Place(0)
STARTING = 4 + 2 * 2 + 1  # batches before a place with two workers is judged


def run(pace: Pace, speeds: dict[Place, tuple[float, float]], batches: int) -> list[Place]:
    """Feed a pace with batches, of (seconds waited, seconds of training) by place; return the places it chose."""
    used = []
    for _ in range(batches):
        used.append(pace.place)
        waited, trained = speeds[pace.place]
        pace.note(waited, waited + trained)
    return [place for place, _ in itertools.groupby(used)]


def test_workers_that_keep_up_stay_as_they_are() -> None:
    pace = Pace(places(2, on_gpu=False), 32)
    assert run(pace, {LOW: (0.1, 0.9)}, 200) == [LOW]
    assert pace.take_line() == ""


def test_starved_workers_get_the_priority_of_the_training() -> None:
    pace = Pace(places(2, on_gpu=False), 32)
    assert run(pace, {LOW: (5.0, 0.1), OWN: (0.01, 0.1)}, 200) == [LOW, OWN]
    assert pace.take_line() == "images are loaded by 2 workers: 291 images/s (by 2 workers at low priority: 6)"
    assert pace.take_line() == ""


def test_if_that_is_not_enough_images_are_loaded_in_the_training_process() -> None:
    pace = Pace(places(2, on_gpu=False), 32)
    assert run(pace, {LOW: (5.0, 0.1), OWN: (0.5, 0.1), HERE: (0.3, 0.1)}, 500) == [LOW, OWN, HERE]
    again = Pace(places(2, on_gpu=False), 32)
    assert run(again, {LOW: (0.4, 0.1), OWN: (0.3, 0.1), HERE: (0.9, 0.1)}, 500) == [LOW, OWN, HERE, OWN]


def test_a_change_of_the_machine_is_noticed() -> None:
    pace = Pace(places(2, on_gpu=False), 32)
    run(pace, {LOW: (5.0, 0.1), OWN: (0.5, 0.1), HERE: (0.3, 0.1)}, 300)
    assert pace.place == HERE
    assert run(pace, {HERE: (0.05, 0.1), OWN: (0.01, 0.1)}, 400) == [HERE, OWN]  # low priority had starved
    assert run(pace, {OWN: (0.4, 0.1), HERE: (0.1, 0.1)}, 400) == [OWN, HERE]


def test_a_trial_that_starves_ends_early() -> None:
    pace = Pace([HERE, LOW, OWN], 32, climbs=True)
    assert run(pace, {HERE: (0.25, 0.1), LOW: (4.0, 0.1), OWN: (0.01, 0.1)}, 10 + 2) == [HERE, LOW]
    assert pace.place == OWN


def test_a_trial_without_a_single_batch_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace([HERE, LOW, OWN], 32, climbs=True)
    assert pace.patience() == 0  # nothing else has been tried
    run(pace, {HERE: (0.25, 0.1), LOW: (0.1, 0.1)}, 10)
    assert (pace.place, pace.patience()) == (LOW, 10)
    pace.note_nothing(10.0)
    assert pace.place == OWN
    assert run(pace, {OWN: (0.01, 0.1)}, 100) == [OWN]
    assert pace.patience() == 0
    monkeypatch.setattr(pacing, "LONGEST_TRIAL_SECONDS", 0.5)
    images = ImageSet(Arrays(np.zeros((40, 8, 8), np.uint8), ["?"] * 40), np.arange(40), ["a"] * 40, in_chans=1)
    loader = eval_loader(images, slow_in_workers, 4, workers=1)
    loader.pace.places, loader.pace.place, loader.pace._rates = [HERE, Place(1)], Place(1), {HERE: 100.0}
    assert torch.cat([labels for _, labels in loader]).tolist() == list(range(40))
    assert loader.pace.place == HERE


def slow_in_workers(_: object) -> torch.Tensor:
    if torch.utils.data.get_worker_info():
        time.sleep(60)
    return torch.zeros(1)


def test_auto_takes_as_many_workers_as_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    tried = places("auto", on_gpu=False)
    assert tried == [Place(0), Place(1, yields=True), Place(1), Place(2), Place(4), Place(8)]
    assert places("auto", on_gpu=True) == [Place(2), Place(4), Place(8)]
    assert places(3, on_gpu=True) == [Place(3)]
    assert places(0, on_gpu=False) == [Place(0)]
    quick = Pace(tried, 32, climbs=True)
    assert run(quick, {HERE: (0.001, 0.1)}, 300) == [HERE]
    assert "in the training process: 317 images/s, waiting 1% of the time" in quick.take_line()
    slow = {Place(0): (1.0, 0.1), Place(1, yields=True): (0.9, 0.1), Place(1): (0.8, 0.1), Place(2): (0.4, 0.1)}
    slow |= {Place(4): (0.4, 0.1), Place(8): (0.0, 0.1)}
    pace = Pace(tried, 32, climbs=True)
    assert run(pace, slow, 500) == [*tried[:5], Place(2)]  # four are no better than two, so eight are not tried


def test_without_shared_memory_there_are_no_workers() -> None:
    pace = Pace(places(2, on_gpu=False), 32)
    pace.without_workers("too little shared memory")
    assert run(pace, {HERE: (9.0, 0.1)}, 100) == [HERE]
    assert pace.take_line().startswith("too little shared memory; images are loaded in the training process")


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge a place after one batch, and never be content."""
    monkeypatch.setattr(pacing, "LONGEST_TRIAL_SECONDS", 0.0)
    monkeypatch.setattr(pacing, "WATCH_SECONDS", 0.0)
    monkeypatch.setattr(pacing, "WAITING", {"fixed": -1.0, "auto": -1.0})
    monkeypatch.setattr(pacing, "CHANGED", 1.0)  # each speed counts as changed


def niceness(_: object) -> torch.Tensor:
    return torch.tensor(float(os.nice(0)))


@pytest.mark.usefixtures("restless")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the workers do not compete with the training")
def test_batches_are_the_same_wherever_they_are_made() -> None:
    images = ImageSet(
        Arrays(np.zeros((40, 8, 8), np.uint8), ["?"] * 40), np.arange(40), [str(i) for i in range(40)], in_chans=1
    )
    given = {"batch_size": 4, "seed": 3}
    loader = train_loader(images, niceness, workers=1, **given)  # type: ignore[arg-type]
    made = list(itertools.islice(loader, 30))
    assert {float(nice.max()) for nice, _ in made} == {19.0, float(os.nice(0))}  # several places were used
    plain = itertools.islice(train_loader(images, niceness, **given), 30)  # type: ignore[arg-type]
    assert [labels.tolist() for _, labels in made] == [labels.tolist() for _, labels in plain]
    measured = eval_loader(images, niceness, 3, workers=1)
    for _ in range(3):
        assert torch.cat([labels for _, labels in measured]).tolist() == list(range(40))
    auto = eval_loader(images, niceness, 3, workers="auto")
    assert torch.cat([labels for _, labels in auto]).tolist() == list(range(40))


@pytest.mark.usefixtures("restless")
def test_what_is_decided_is_said_and_validation_does_not_count() -> None:
    images = ImageSet(Arrays(np.zeros((40, 8, 8), np.uint8), ["?"] * 40), np.zeros(40), ["a"], in_chans=1)
    loader = train_loader(images, niceness, batch_size=4, seed=0, workers=1)
    lines: list[str] = []
    loader.say = lines.append
    for number, _ in zip(range(30), loader, strict=False):
        if number < 20:
            loader.waited_seconds = 0.0  # as after each epoch
        if number == 20:
            assert not lines
            assert loader.pace.place == Place(1, yields=not torch.cuda.is_available())
    assert loader.waited_seconds > 0
    assert torch.cuda.is_available() or "images are loaded " in lines[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the workers do not compete with the training")
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the CPU time of other processes from /proc")
def test_workers_keep_up_beside_four_busy_processes(tmp_path: Path) -> None:
    for name, number in itertools.product("ab", range(100)):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        left = (3 * number) % 300
        PHOTOGRAPHS[name].crop((left, 40, left + 200, 190)).save(tmp_path / "data" / name / f"{number}.jpg")
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        speeds = {workers: speed(tmp_path, workers, busy) for workers in (0, 2, "auto")}
    finally:
        for process in busy:
            process.kill()
            process.wait()
    print(f"images per second of one busy process, by number of workers: {speeds}")
    assert speeds[2] > 0.6 * speeds[0]
    assert speeds["auto"] > 0.6 * speeds[0]


def speed(folder: Path, workers: int | str, busy: Sequence[subprocess.Popen[bytes]]) -> float:
    """Return the images trained on in each second of CPU time that a busy process gets.

    20 s are measured, after 40 s or more in which the places are tried. What other programs take from the training
    at that time they take from the busy processes too.
    """
    settings = {"model": "convmixer_64_4_p4_k5", "img_size": 32, "workers": workers, "epochs": 10_000, "draw": False}
    settings["cache"] = "off"
    config = override(load_recipe("finetune"), settings)
    started, found, used = time.monotonic(), [], [(0.0, 0.0)]

    def stop_in_time(row: dict[str, Any]) -> None:
        now = time.monotonic()
        if row["epoch"] > TRIED_EPOCHS and now - started > 40:
            found.append(row["images_per_second"])
            used.append((now, statistics.mean(map(cpu_seconds, busy))))
        if len(found) > 2 and now - used[1][0] > 20:
            raise Enough

    with pytest.raises(Enough):
        train(str(folder / "data"), config, out=folder / f"run-{workers}", on_epoch=stop_in_time)
    (start, before), (end, after) = used[1], used[-1]
    share = (after - before) / (end - start)
    return statistics.harmonic_mean(found[1:]) / share  # all epochs have as many images


TRIED_EPOCHS = 9  # of 4 batches each: as many as trying each place takes


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """Return the CPU time that a process has used."""
    user, system = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Enough(Exception):
    """Ends a training."""
