"""A study that tunes its arms: equal trials on validation images, kept over a kill, shown in the report."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from convmixer.config import override
from convmixer.errors import RequestError
from convmixer.run_folder import StudyFolder
from convmixer.studies.plan import identity
from convmixer.studies.run import compare
from convmixer.studies.schema import load_study, parse
from study_runs import kill_in_the_middle, start, tiny

SETTINGS = {"lr": {"low": 0.005, "high": 0.05, "log": True}, "smoothing": {"choices": [0.0, 0.1]}}
TUNE = {"trials": 3, "epochs": 1, "val_fraction": 0.2, "settings": SETTINGS}


def tuned(folder: Path, **changes: Any) -> Path:
    """Write a study of two small arms with three short trials each, and one seed."""
    path = tiny(folder, seeds=[0], tune=TUNE | changes)
    raw = yaml.safe_load(path.read_text())
    raw["recipe"] |= {"batch_size": 256, "draw": False, "val_fraction": 0}
    path.write_text(yaml.safe_dump(raw))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned study whose first worker was killed during the trials, continued to its end."""
    folder = tmp_path_factory.mktemp("tuned")
    study, out = tuned(folder), folder / "out"
    kill_in_the_middle(start(study, out, in_one_process=True), r"run 3 of 6.*depthwise-trial1")
    (out / "said.txt").write_text(start(study, out, "--resume", in_one_process=True).finish())
    return out


def test_every_arm_has_the_same_trials_and_none_reads_the_test_set(ended: Path) -> None:
    found = lines(StudyFolder(ended).trials)
    assert [r["name"] for r in found] == [f"{arm}-trial{i}" for i in range(3) for arm in ("depthwise", "none")]
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert [first["config"][key] for key in SETTINGS] == [second["config"][key] for key in SETTINGS]
    for record in found:
        assert record["results"]["test_top1"] is None
        assert record["results"]["val_top1"] > 0
        assert record["config"]["val_fraction"] == 0.2
        assert record["config"]["epochs"] == 1
    assert found[0]["config"]["lr"] == 0.02  # the shared recipe is the first trial


def test_seeds_train_with_what_their_arm_chose(ended: Path) -> None:
    trials = lines(StudyFolder(ended).trials)
    for record in lines(StudyFolder(ended).records):
        own = [t for t in trials if t["results"]["arm"] == record["results"]["arm"]]
        best = max(own, key=lambda t: t["results"]["val_top1"])
        assert [record["config"][key] for key in SETTINGS] == [best["config"][key] for key in SETTINGS]
        assert record["config"]["epochs"] == 2
        assert record["config"]["val_fraction"] == 0
        assert record["results"]["test_top1"] is not None


def test_what_a_killed_worker_had_done_is_not_repeated(ended: Path) -> None:
    said = (ended / "said.txt").read_text()
    assert len(re.findall(r"study    run \d of 6", said)) == 4
    assert len(re.findall(r"^chosen   (depthwise|none): ", said, re.MULTILINE)) == 2


def test_the_report_shows_trials_and_choices(ended: Path) -> None:
    text = (ended / "report.md").read_text()
    table = text.partition("## Tuning")[2].partition("![")[0]
    assert "Every arm got 3 trials of 1 epoch with the same values" in table
    assert table.count("●") == 1 + 2  # in the sentence, and once for each arm
    assert len(re.findall(r"^\| \d \| [\d.]+ \| [\d.]+ \| ", table, re.MULTILINE)) == 3
    assert (ended / "pictures" / "trials.svg").stat().st_size > 1000
    assert "<h2>Tuning</h2>" in (ended / "report.html").read_text()


def test_a_folder_without_its_queue_keeps_trials_and_runs(ended: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for file in (StudyFolder(ended).plan, StudyFolder(ended).trials):
        (out / file.name).write_bytes(file.read_bytes())
    found = compare(str(tuned(tmp_path)), "digits", out, resume=True, budget="0.001s")
    assert found["missing"] == ["depthwise-seed0", "none-seed0"]
    assert StudyFolder(out).trials.read_text() == StudyFolder(ended).trials.read_text()


def test_no_seed_runs_before_every_trial_has_ended(ended: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "study.json").write_bytes(StudyFolder(ended).plan.read_bytes())
    kept = StudyFolder(ended).trials.read_text().splitlines(keepends=True)[:-1]
    StudyFolder(out).trials.write_text("".join(kept))
    found = compare(str(tuned(tmp_path)), "digits", out, resume=True, budget="0.001s")
    assert found["missing"] == ["none-trial2", "depthwise-seed0", "none-seed0"]
    assert "Incomplete: 5 of 8 runs" in (out / "report.md").read_text()


@pytest.mark.usefixtures("measured_here")
def test_a_trial_that_diverges_is_recorded_and_not_chosen(tmp_path: Path) -> None:
    study = tuned(tmp_path, trials=2, settings={"lr": {"low": 1e30, "high": 1e31, "log": True}})
    raw = yaml.safe_load(study.read_text())
    raw["recipe"] |= {"clip_norm": 0, "optimizer": "sgd"}
    study.write_text(yaml.safe_dump(raw))
    found = compare(str(study), "digits", tmp_path / "out")
    trials = {r["name"]: r["results"] for r in lines(tmp_path / "out" / "trials.jsonl")}
    assert (
        "not finite" in trials["depthwise-trial1"]["diverged"] or "loss is" in trials["depthwise-trial1"]["diverged"]
    )
    assert trials["depthwise-trial1"]["val_top1"] is None
    assert (found["missing"], found["failed"]) == ([], [])
    assert "| diverged |" in (tmp_path / "out" / "report.md").read_text()
    assert {r["config"]["lr"] for r in lines(tmp_path / "out" / "records.jsonl")} == {0.02}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"trials": 1}, "trials must be a whole number of at least 2"),
        ({"on": "test"}, "the test set is never used to choose"),
        ({True: "test"}, "the test set is never used to choose"),  # as YAML reads `on: test`
        ({"epochs": 0}, "epochs must be a whole number"),
        ({"val_fraction": 1.0}, "val_fraction must be a share"),
        ({"settings": {}}, "settings must be"),
        ({"settings": {"lr": {"low": 1}}}, "tune: lr must be"),
        ({"settings": {"rate": {"choices": [1, 2]}}}, "rate"),
        ({"tries": 3}, "unknown key of tune 'tries'.*trials"),
    ],
)
def test_a_wrong_tune_is_refused(tmp_path: Path, changes: dict[Any, Any], error: str) -> None:
    raw = yaml.safe_load(tuned(tmp_path).read_text())
    with pytest.raises(RequestError, match=error):
        parse("mine", raw | {"tune": TUNE | changes})


def test_a_study_extends_a_shipped_one() -> None:
    base, longer, tuned_models = (load_study(name) for name in ("models", "models-100", "models-tuned"))
    assert longer.arms == tuned_models.arms == base.arms
    assert longer.claims == base.claims
    assert longer.recipe == override(base.recipe, {"epochs": 100})
    assert tuned_models.recipe == base.recipe
    assert tuned_models.tune is not None
    assert tuned_models.tune.trials >= 8


def test_only_shipped_studies_that_stand_alone_are_extended(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for name, error in (
        ("nothing", "unknown study"),
        ("models-100", "name that one, models"),
        ("[]", "unknown study"),
    ):
        path.write_text(f"extends: {name}\n")
        with pytest.raises(RequestError, match=error):
            load_study(str(path))


def test_a_study_without_tuning_keeps_the_identity_it_had_before_studies_could_tune() -> None:
    arms = {"a": {"model": "convmixer", "dim": 8, "depth": 1}, "b": {"model": "convmixer", "dim": 16, "depth": 1}}
    claim = {"says": "Wider is better", "first": "b", "second": "a", "relation": "better", "matters": 1.0}
    raw = {"data": "digits", "recipe": {"epochs": 3}, "seeds": [0, 1], "arms": arms, "claims": [claim]}
    assert identity(parse("two", raw)) == "two-7345726aea"
    assert identity(parse("two", raw | {"tune": TUNE})) != "two-7345726aea"
