"""The cost of a study: probes, dry runs, budgets, the time left, matching by time."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from convmixer.config import Config
from convmixer.studies import plan as plan_module
from convmixer.studies.queue import Queue
from convmixer.studies.run import compare
from convmixer.studies.runner import Runner
from convmixer.studies.schema import load_study
from study_runs import tiny


def test_arms_are_probed_in_turns_where_a_claim_is_about_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def probe(data: str, config: Config, build: tuple[str, dict[str, Any]]) -> dict[str, Any]:
        asked.append(build[0])
        n = float(len(asked))
        return {"train_images_per_second": n, "infer_images_per_second": n, "peak_memory_bytes": n, "seconds": n}

    monkeypatch.setattr(plan_module, "probe", probe)
    arms = {name: {"build": [name, {}], "parameters": 1, "macs": 1} for name in ("p4", "p2")}
    plan = {"data": {"spec": "none"}, "arms": arms}
    found = plan_module.probe_all(plan, load_study("patch-size"))
    assert asked == ["p4", "p2"] * 3
    assert found["p4"]["seconds"] == 3
    assert [turn["infer_images_per_second"] for turn in found["p2"]["rounds"]] == [2, 4, 6]
    about_accuracy = plan_module.probe_all(plan | {"arms": {"base": arms["p4"]}}, load_study("ablation"))
    assert len(about_accuracy["base"]["rounds"]) == 1


def test_the_time_left_counts_what_is_done(whole: Path, tmp_path: Path) -> None:
    plan = json.loads((whole / "study.json").read_text())
    study = load_study(str(tiny(tmp_path)))
    queue = Queue(f"sqlite:///{tmp_path}/queue.db", plan["identity"])
    queue.start(plan["runs"], plan)
    runner = Runner(study, "digits", queue, tmp_path, math.inf)
    probed = plan["probes"]["none"]["seconds"]
    assert runner._estimate("none-seed0") == probed
    metrics = tmp_path / "runs" / "none-seed0" / "metrics.csv"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("epoch,train_loss\n1.0,2.0\n")  # of two epochs
    assert runner._estimate("none-seed0") == probed / 2
    study.arms["none"].recipe["epochs"] = 4  # of its own, as `unequal` allows
    assert runner._estimate("none-seed0") == probed * 3 / 4
    del study.arms["none"].recipe["epochs"]
    assert Runner(study, "digits", queue, tmp_path, math.inf, whole)._estimate("none-seed0") == 0
    elsewhere, here = (json.loads((whole / "records.jsonl").read_text().splitlines()[0]) for _ in range(2))
    elsewhere["results"] |= {"arm": "none", "seconds": 1e6}
    here["results"] |= {"arm": "none", "seconds": 8.0}
    elsewhere["environment"]["gpus"] = ["another machine's"]
    for record, expected in ((elsewhere, probed), (here, 8.0)):
        queue.take(lambda _, record=record: record)  # type: ignore[misc]
        assert runner._estimate("none-seed1") == expected


@pytest.mark.slow
def test_a_budget_trains_what_fits_and_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, out = str(tiny(tmp_path)), tmp_path / "out"
    monkeypatch.setattr(Runner, "_estimate", lambda self, run: 1.0 if run == "depthwise-seed0" else 1e6)
    found = compare(study, "digits", out, budget="2h")
    assert found["missing"] == ["none-seed0", "depthwise-seed1", "none-seed1"]
    assert "Incomplete: 1 of 4 runs are done" in (out / "report.md").read_text()
    assert found["verdicts"][0]["verdict"] == "not decided"
    monkeypatch.undo()
    assert compare(study, "digits", out, resume=True, budget="2h")["missing"] == []


@pytest.mark.slow
def test_a_dry_run_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(str(tiny(tmp_path)), "digits", tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    assert found["arms"]["none"]["peak_memory_bytes"] > 0
    assert found["seconds_total"] > 0
    assert "nothing was trained" in capsys.readouterr().out


@pytest.mark.slow
def test_wall_time_can_be_matched(tmp_path: Path) -> None:
    match = {"by": "seconds", "like": "depthwise", "tolerance": 0.9}
    found = compare(str(tiny(tmp_path, match=match)), "digits", tmp_path / "out", dry_run=True)
    assert found["arms"]["none"]["parameters"] > 0
