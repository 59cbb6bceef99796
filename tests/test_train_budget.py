"""A time budget is used up and not exceeded, at any speed; a killed run repeats its steps with the same learning
rates.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commands import Command
from convmixer import records
from convmixer.config import Config, override
from convmixer.errors import RequestError
from convmixer.processes import own_start
from convmixer.recipes import load_recipe
from convmixer.run_folder import SHARES
from convmixer.train.budget import Budget
from convmixer.train.fits import what_fits
from convmixer.train.gallery import MISTAKES_SECONDS, rehearse
from convmixer.train.module import TrainingModule
from convmixer.train.plans import Plan
from convmixer.train.run import resume, train
from convmixer.train.setup import prepare

SECONDS = 12.0
SMALL: dict[str, Any] = {
    "model": "convmixer_16_2_p1_k3",
    "workers": 0,
    "precision": "fp32",
    "lr": 0.02,
    "draw": False,
}


@pytest.fixture(scope="module")
def slowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose steps take five times as long from the middle of its time on."""
    out, step = tmp_path_factory.mktemp("slowed") / "run", TrainingModule.training_step
    middle = time.time() + SECONDS / 2

    def throttled(module: TrainingModule, *batch: Any) -> None:
        step(module, *batch)
        time.sleep(0.03 if time.time() < middle else 0.15)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", throttled)
        train("digits", Config(**SMALL, epochs=0, max_time=f"{SECONDS}s"), out=out)
    return out


def test_a_run_that_slows_down_five_times_ends_in_time_with_its_rate_at_the_bottom(slowed: Path) -> None:
    (record,) = records.read(slowed / "record.jsonl")
    assert 0.85 < record.results["max_time_share"] < 1.05  # a busy machine may take long to write the last files
    assert record.results["max_time_share"] == pytest.approx(record.results["seconds"] / SECONDS)
    rates = [float(line.split(",")[2]) for line in (slowed / "steps.csv").read_text().splitlines()[1:]]
    assert max(rates) == pytest.approx(SMALL["lr"], rel=0.1)
    assert rates[-1] < 0.2 * SMALL["lr"]


def test_repeated_from_its_record_a_timed_run_gives_the_same_weights(slowed: Path, tmp_path: Path) -> None:
    """All that died with the machine is taken again, now at another speed."""
    shutil.copytree(slowed, tmp_path / "run")
    for name in ("record.jsonl", "checkpoints/latest.pt", "checkpoints/previous.pt"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "weights")
    resume(tmp_path / "run")
    for which in ("best", "last"):
        before, after = (
            load_file(run / "weights" / which / "model.safetensors") for run in (slowed, tmp_path / "run")
        )
        assert all(torch.equal(before[key], after[key]) for key in before), which


class Clock:
    """Time that passes when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("change", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("step_seconds", [0.05, 2.0])
def test_ten_minutes_are_used_at_any_speed(tmp_path: Path, change: float, step_seconds: float) -> None:
    """Evaluation is `change` times slower from the middle on too, as the gauge would measure it."""
    clock, plan = Clock(), Plan(None, 0, 0.0, None, 0.1)
    budget, done, per_epoch = Budget(600, clock, tmp_path / SHARES), 0, 100
    budget.end_of_epoch, budget.evaluation, budget.writing = 2.0, 3.0, 4.0
    clock.now = 20.0
    budget.keep()
    shares = []
    while not (done and budget.is_over(done)):
        slower = change if clock.now > 300 else 1.0
        shares.append(budget.progress(plan, done))
        clock.now, done = clock.now + step_seconds * slower, done + 1
        if slower != budget.slowdown:
            budget.slowdown = slower
            budget.keep()
        if done % per_epoch == 0 and not budget.is_over(done):
            clock.now += 2.0 * slower
            budget.keep()
    clock.now += (2.0 + 3.0 + 4.0) * slower
    assert 0.9 < clock.now / 600 < 1.02
    assert shares == sorted(shares)
    assert shares[0] < 0.01
    assert shares[-1] > 0.9


def test_a_wrong_first_estimate_of_evaluation_is_corrected_by_the_first_validation(tmp_path: Path) -> None:
    clock, plan = Clock(), Plan(None, 0, 0.0, None, 0.1)
    budget, done = Budget(600, clock, tmp_path / SHARES), 0
    budget.end_of_epoch, budget.evaluation, budget.evaluated, budget.writing = 30.0, 120.0, 3.0, 4.0
    budget.keep()
    while not (done and budget.is_over(done)):
        budget.progress(plan, done)
        clock.now, done = clock.now + 2.0, done + 1
        if done % 20 == 0:
            clock.now += 2.0
            budget.saw_end_of_epoch(2.0, 1.0)
    assert 0.95 < (clock.now + 2.0 + 3.0 + 4.0) / 600 < 1.02


def test_a_budget_takes_the_place_of_epochs_unless_both_are_given_or_layers_are_frozen() -> None:
    recipe = load_recipe("finetune")
    assert override(recipe, {"max_time": "10m"}).epochs == 0
    assert override(recipe, {"max_time": "10m", "epochs": 7}).epochs == 7
    assert override(recipe, {"max_time": "10m", "freeze": "all"}).epochs == recipe.epochs
    with pytest.raises(RequestError, match="unless max_time is given"):
        override(recipe, {"epochs": 0})


def test_with_epochs_too_a_budget_is_the_most_it_takes(tmp_path: Path) -> None:
    flags = "--epochs 1 --max-time 10m --workers 0 --draw false --precision fp32"
    words = ("train", "digits", "--model", SMALL["model"], *flags.split(), "--out", str(tmp_path / "run"))
    training, began = Command(*words), time.time()  # in this order: the first command of a test run waits for imports
    training.finish()
    (record,) = records.read(tmp_path / "run" / "record.jsonl")
    assert record.results["epochs"] == 1
    # from the start of the process; what follows the last line is the end of Python
    assert 0.7 * (time.time() - began) < record.results["seconds"] < 300
    last = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[-1].split(",")
    assert float(last[2]) == 0.0  # the rate came down by the steps


def test_a_process_knows_when_it_began() -> None:
    code = "import time; from convmixer.processes import own_start; time.sleep(0.5); print(own_start(time.time()))"
    before = time.time()
    began = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    assert before - 0.1 < began < time.time() - 0.5
    assert own_start(0.0) == 0.0  # what the caller knows already is not made later


def test_the_time_for_pictures_is_measured_by_drawing_them_once(tmp_path: Path) -> None:
    job = prepare("digits", Config(**SMALL, epochs=1))
    rows = [{"epoch": 1, "step": 4, "lr": 0.1, "train_loss": 1.0, "images_per_second": 9.0}]
    began = time.perf_counter()
    seconds = rehearse(job, rows, [], job.model, None)
    assert 0.05 < seconds < time.perf_counter() - began + MISTAKES_SECONDS


def test_a_budget_too_short_for_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="too short"):
        train("digits", Config(**SMALL, epochs=0, max_time="1s"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_short_budget_names_what_would_fit() -> None:
    job = prepare("digits", Config(**SMALL | {"model": "convmixer_128_8_p1_k5"}, epochs=0, max_time="20s"))
    assert what_fits(job, 2.7, reading=0.0).endswith(
        "about 2.7 epochs fit; five or more would with --model convmixer_128_4_p1_k5 or --img-size 5"
    )
    assert what_fits(job, 1.2, reading=0.0).endswith("--model convmixer_64_4_p1_k5 or --img-size 3")
    assert "waiting for images" in what_fits(job, 2.0, reading=0.9)
