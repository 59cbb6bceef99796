"""Hyperparameter search: chosen only on validation, stopped and continued, shared by workers, saved as a recipe."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import matplotlib
import optuna
import pytest
import yaml

from commands import Command
from convmixer.cli import main
from convmixer.config import Config
from convmixer.errors import RequestError
from convmixer.recipes import load_settings
from convmixer.run_folder import is_own_output
from convmixer.studies.space import suggest, values_of
from convmixer.tuning.space import load_space

SPACE = "lr: {low: 1.0e-2, high: 0.05, log: true}\nsmoothing: {choices: [0.0, 0.1]}\n"
FLAGS = [
    "--model",
    "convmixer_8_1_p2_k3",
    "--epochs",
    "2",
    "--workers",
    "0",
    "--batch-size",
    "128",
    "--precision",
    "fp32",
]


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(SPACE)
    return path


def command(space: Path, out: Path, *more: str) -> list[str]:
    return ["tune", "digits", *FLAGS, "--space", str(space), "--out", str(out), *more]


def tuned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def trials(out: Path) -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{out}/queue.db"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).get_trials()


def test_a_search_ends_in_a_recipe_and_never_reads_the_test_split(
    space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "search"
    style = {key: value for key, value in matplotlib.rcParams.items() if "backend" not in key}
    result = tuned(capsys, *command(space, out, "--trials", "4"))
    assert {key: matplotlib.rcParams[key] for key in style} == style  # for later pictures of this process
    assert result["trials"] + result["pruned"] == 4
    best = max((t for t in trials(out) if t.value is not None), key=lambda t: t.value or 0)
    assert result["val_top1"] == best.value
    for run in (out / "trials").iterdir():
        assert '"test_top1": null' in (run / "record.jsonl").read_text()
        assert not (run / "checkpoints").exists()
    recipe = load_settings(Path(result["recipe"]))
    assert {key: recipe[key] for key in ("lr", "smoothing")} == result["best"]
    assert recipe["test"] is True
    assert Config(**{key: tuple(v) if isinstance(v, list) else v for key, v in recipe.items()}).epochs == 2
    table = (out / "trials.csv").read_text().splitlines()
    assert table[0] == "trial,state,val_top1,seconds,lr,smoothing"
    assert len(table) == 5
    assert all((out / name).stat().st_size > 5000 for name in ("history.png", "importance.png"))
    assert is_own_output(out)

    assert main(command(space, out, "--trials", "5")) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    more = tuned(capsys, *command(space, out, "--trials", "5", "--resume"))
    assert more["trials"] + more["pruned"] == 5
    assert main([*command(space, out, "--resume"), "--lr", "0.5", "--smoothing", "0.3"]) == 2
    assert "has other data, settings or another space" in capsys.readouterr().err


def test_a_killed_trial_goes_on_where_it_was(space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "search"
    long = [*command(space, out, "--trials", "1"), "--epochs", "300"]
    worker = Command(*long)
    assert any(re.match("epoch 3/", line) for line in worker.stdout)
    os.killpg(worker.pid, signal.SIGKILL)
    worker.communicate(20)
    (killed,) = trials(out)
    assert killed.state == optuna.trial.TrialState.RUNNING
    values = dict(killed.params)

    # ends at once: the run is cut to what it has, by a budget that its settings do not know
    config = out / "trials" / "0000" / "config.yaml"
    contents = yaml.safe_load(config.read_text())
    contents["schedule"] |= {"epochs": 4, "steps": 4 * contents["schedule"]["steps_per_epoch"]}
    config.write_text(yaml.safe_dump(contents, sort_keys=False))
    result = tuned(capsys, *long, "--resume")
    assert result["trials"] == 1
    assert result["failed_trials"] == 1  # the one whose worker was killed
    assert trials(out)[-1].params == values
    assert '"event": "resume"' in (out / "trials" / "0000" / "log.jsonl").read_text()


def test_two_workers_share_a_search(space: Path, tmp_path: Path) -> None:
    out = tmp_path / "search"
    long = ["--epochs", "4"]  # the faster worker must not end before the other one has begun
    assert main(command(space, out, "--trials", "1", *long)) == 0
    later = command(space, out, "--trials", "6", *long)
    workers = [Command(*later, flag, OMP_NUM_THREADS="1") for flag in ("--resume", "--worker")]
    said = [worker.communicate(200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    found = trials(out)
    assert 6 <= len(found) <= 7  # both may start one when five have been started
    first, *others = (trial.user_attrs["worker"]["pid"] for trial in found)
    assert first == os.getpid()
    assert set(others) == {worker.pid for worker in workers}
    assert len({trial.params["lr"] for trial in found}) == len(found)


def test_bad_trials_are_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("lr: {choices: [1.0e-9, 0.02]}\n")
    flags = ["--epochs", "4", "--trials", "9"]
    result = tuned(capsys, *command(space, tmp_path / "search"), *flags)
    assert result["pruned"] >= 1
    assert result["best"]["lr"] > 0.01


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lrr: {low: 0, high: 1}", "did you mean 'lr'"),
        ("lr: {low: 2, high: 1}", "low must be a number below high"),
        ("lr: {low: 0, high: 1, log: true}", "above 0 if log is true"),
        ("lr: 3", r"must be \{low: A, high: B\}"),
        ("lr: {choices: []}", "no choices"),
        ("schedule: {choices: [cosine, sine]}", "must be one of"),
        ("momentum: {low: 0.5, high: 2}", "momentum must be"),
        ("{}", "no setting"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=said):
        load_space(path)


def test_the_shipped_space_gives_settings() -> None:
    space = load_space(None)
    study = optuna.create_study()
    for _ in range(20):
        trial = study.ask()
        values = suggest(trial, space)
        assert values == values_of(trial.params, space)
        assert 0.001 <= values["lr"] <= 0.1
