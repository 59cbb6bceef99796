"""Whole studies on real digits: a killed one ends like one never killed, budgets, refusals, verification, report."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from convmixer.cli import main
from convmixer.config import Config
from convmixer.errors import RequestError
from convmixer.studies import plan as plan_module
from convmixer.studies.queue import Queue
from convmixer.studies.run import Runner, compare
from convmixer.studies.schema import find_study, load_study
from convmixer.studies.verify import verify

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


def tiny(folder: Path, **changes: Any) -> Path:
    """Write a variant of the smoke study that takes seconds."""
    raw = yaml.safe_load(find_study("smoke").read_text(encoding="utf-8"))
    raw["recipe"] |= {"epochs": 2, "precision": "fp32", "checkpoint_seconds": 0.2}
    for arm in raw["arms"].values():
        arm["depth"] = 1
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw | changes))
    return path


def command(study: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "convmixer", "compare", str(study), "digits", "--out", str(out), *more]


def start(study: Path, out: Path, *more: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CONVMIXER_KERNELS": "0", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command(study, out, *more),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_in_the_middle(worker: "subprocess.Popen[str]", line: str) -> None:
    """Kill a worker as soon as it says that line."""
    assert worker.stdout
    for said in worker.stdout:
        if re.search(line, said):
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            worker.stdout.close()
            return
    pytest.fail(f"the worker ended before it said {line}")


def finish(worker: "subprocess.Popen[str]") -> str:
    said = worker.communicate(timeout=300)[0]
    assert worker.returncode == 0, said
    return str(said)


def numbers(out: Path) -> dict[str, tuple[float, float]]:
    """Return run -> test accuracy and loss, all digits."""
    lines = (out / "records.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == len({r["name"] for r in found})
    return {r["name"]: (r["results"]["test_top1"], r["results"]["test_loss"]) for r in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny study that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(tiny(folder), folder / "out"))
    return folder / "out"


def test_a_study_leaves_records_and_a_report(whole: Path) -> None:
    assert set(numbers(whole)) == {"depthwise-seed0", "none-seed0", "depthwise-seed1", "none-seed1"}
    page = (whole / "report.html").read_text()
    assert page.count("<svg ") >= 5
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    text = (whole / "report.md").read_text()
    assert "Mixing positions helps" in text
    for picture in re.findall(r"\]\((pictures/[^)]+)\)", text):
        assert (whole / picture).stat().st_size > 1000


def test_a_killed_study_resumes_to_the_same_numbers(whole: Path, tmp_path: Path) -> None:
    study, out = tiny(tmp_path), tmp_path / "out"
    kill_in_the_middle(start(study, out), r"run 2 of 4.*none-seed0")
    said = finish(start(study, out, "--resume"))
    assert numbers(out) == numbers(whole)
    assert "run 1 of 4" not in said  # nothing that was done is repeated


def test_a_folder_without_its_queue_goes_on_from_its_records(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "queue.db").unlink()
    lines = (whole / "records.jsonl").read_text().splitlines(keepends=True)
    (out / "records.jsonl").write_text("".join(lines[:3]))
    found = compare(str(tiny(tmp_path)), "digits", out, resume=True, budget="0.001s")
    assert found["missing"] == [json.loads(lines[3])["name"]]
    assert (out / "records.jsonl").read_text() == "".join(lines[:3])


def test_equal_runs_of_another_study_are_reused(whole: Path, tmp_path: Path) -> None:
    arms = yaml.safe_load(tiny(tmp_path).read_text())["arms"]
    arms = {"convolution": arms["depthwise"], "wider": arms["none"] | {"dim": 36, "fixed": True}}
    claim = {"says": "it mixes", "first": "convolution", "second": "wider", "relation": "better", "matters": 1.0}
    match = {"by": "parameters", "like": "convolution", "solve": "dim"}
    study, out = tiny(tmp_path, arms=arms, claims=[claim], match=match), tmp_path / "out"
    said = finish(start(study, out, "--reuse", str(whole)))
    assert said.count("reused   convolution-seed") == 2
    ours, theirs = numbers(out), numbers(whole)
    for seed in (0, 1):
        assert ours[f"convolution-seed{seed}"] == theirs[f"depthwise-seed{seed}"]
    assert not (out / "runs" / "convolution-seed0").exists()
    assert (out / "runs" / "wider-seed0").exists()
    assert f"({os.path.relpath(whole, out)}/pictures/depthwise-kernels.png)" in (out / "report.md").read_text()
    assert main(["verify", str(out / "records.jsonl"), "--data", "digits", "--run", "convolution-seed1"]) == 0
    assert "convolution-seed0 is depthwise-seed0 of the study tiny" in (out / "report.md").read_text()


def test_a_folder_without_a_study_is_not_reused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no study to reuse"):
        compare(str(tiny(tmp_path)), "digits", tmp_path / "out", reuse=tmp_path / "nothing")
    assert not (tmp_path / "out").exists()


def test_smoke_takes_at_most_three_minutes_and_opens_in_a_browser(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no Chromium on this machine")
    began = time.monotonic()
    said = subprocess.run(
        [sys.executable, "-m", "convmixer", "compare", "smoke", "--out", str(tmp_path / "out"), "--json"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    seconds = time.monotonic() - began
    result = json.loads(said.splitlines()[-1])
    assert result["missing"] == result["failed"] == []
    assert seconds < 180 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # others may use this machine too
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page, asked = browser.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(Path(result["report"]).resolve().as_uri())
        assert not [url for url in asked if not url.startswith(("file:", "data:"))]
        drawn = page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert drawn
        assert page.locator("figure svg").count() == 7
        assert page.locator("figure img").count() >= 1
        browser.close()


@pytest.mark.slow
def test_a_killed_run_continues_from_its_checkpoint(whole: Path, tmp_path: Path) -> None:
    study, out = tiny(tmp_path), tmp_path / "out"
    worker, deadline = start(study, out), time.monotonic() + 600
    while not list(out.glob("runs/depthwise-seed0/checkpoints/latest.pt")):
        assert worker.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(worker.pid, signal.SIGKILL)
    worker.communicate()
    said = finish(start(study, out, "--resume"))
    assert re.search(r"resuming .*depthwise-seed0 at step (?!0 )\d+", said)
    assert numbers(out) == numbers(whole)


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


def test_failed_runs_are_exit_status_1_after_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = Runner.train

    def failing(runner: Runner, run: str) -> dict[str, Any]:
        if not run.startswith("none"):
            return train(runner, run)
        raise RuntimeError("no")

    monkeypatch.setattr(Runner, "train", failing)
    out = tmp_path / "study"
    assert main(["compare", str(tiny(tmp_path, seeds=[0])), "digits", "--out", str(out), "--json"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == ["none-seed0"]
    assert "RuntimeError: no" in (out / "report.html").read_text()
    monkeypatch.undo()
    assert main(["compare", str(tmp_path / "tiny.yaml"), "digits", "--out", str(out), "--resume"]) == 0


def test_a_study_does_not_go_on_with_other_data(whole: Path, tmp_path: Path) -> None:
    study, other, out = str(tiny(tmp_path)), tmp_path / "digits", tmp_path / "out"
    shutil.copytree(whole, out)
    pixels = np.random.default_rng(0)
    for split, kind, number in itertools.product(("train", "test"), "0123456789", range(2)):
        path = other / split / kind / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 255, (8, 8), np.uint8)).save(path)
    with pytest.raises(RequestError, match="holds other data than the study was started with"):
        compare(study, str(other), out, resume=True)
    with pytest.raises(RequestError, match="that queue holds the study already"):
        compare(study, str(other), tmp_path / "new", storage=f"sqlite:///{out}/queue.db")


def test_folders_are_not_mixed_up(whole: Path, tmp_path: Path) -> None:
    study = str(tiny(tmp_path))
    with pytest.raises(RequestError, match="continue it with --resume"):
        compare(study, "digits", whole)
    with pytest.raises(RequestError, match="has changed since"):
        compare(str(tiny(tmp_path, seeds=[0, 1, 2])), "digits", whole, resume=True)
    with pytest.raises(RequestError, match="holds the study tiny"):
        compare("smoke", "digits", whole, resume=True)
    with pytest.raises(RequestError, match="start it without --worker first"):
        compare(study, "digits", tmp_path / "new", worker=True)


def test_nothing_trains_when_a_match_is_impossible(tmp_path: Path) -> None:
    match = {"by": "parameters", "like": "depthwise", "tolerance": 0.00001}
    with pytest.raises(RequestError, match="arm none: impossible match"):
        compare(str(tiny(tmp_path, match=match)), "digits", tmp_path / "out")
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.slow
def test_an_unequal_study_says_so_on_top(tmp_path: Path) -> None:
    raw = yaml.safe_load(tiny(tmp_path).read_text())
    raw["arms"]["none"]["recipe"] = {"lr": 0.001}
    found = compare(str(tiny(tmp_path, unequal=True, arms=raw["arms"])), "digits", tmp_path / "out", budget="1s")
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.index("Unequal: not all arms share one recipe") < text.index("## Claims")
    assert "no mixing (lr 0.001 instead of 0.02)" in Path(found["report"]).read_text()


@pytest.mark.slow
def test_wall_time_can_be_matched(tmp_path: Path) -> None:
    match = {"by": "seconds", "like": "depthwise", "tolerance": 0.9}
    found = compare(str(tiny(tmp_path, match=match)), "digits", tmp_path / "out", dry_run=True)
    assert found["arms"]["none"]["parameters"] > 0


def test_verify_measures_again(whole: Path, tmp_path: Path) -> None:
    found = verify(whole / "records.jsonl")
    assert found["holds"]
    assert len(found["records"]) == 4
    single = verify(whole / "runs" / "none-seed0" / "record.jsonl")
    assert single["records"][0]["measured"] == pytest.approx(numbers(whole)["none-seed0"][0], abs=1e-6)


def test_verify_names_what_does_not_hold(whole: Path, tmp_path: Path) -> None:
    record = json.loads((whole / "records.jsonl").read_text().splitlines()[0])
    shutil.copytree(whole / "runs" / record["name"] / "weights", tmp_path / "runs" / record["name"] / "weights")

    def changed(**parts: Any) -> Path:
        path = tmp_path / "records.jsonl"
        path.write_text(json.dumps(record | parts) + "\n")
        return path

    assert verify(changed())["holds"]
    with pytest.raises(RuntimeError, match="1 of 1 recorded numbers do not hold: depthwise-seed0"):
        verify(changed(results=record["results"] | {"test_top1": record["results"]["test_top1"] - 1}))
    with pytest.raises(RequestError, match="other data"):
        verify(changed(data=record["data"] | {"checksum": "sha256:0"}))
    with pytest.raises(RequestError, match="weights of depthwise-seed0 are not at"):
        verify(changed(results=record["results"] | {"weights": "nowhere"}))
    with pytest.raises(RequestError, match="no record named x"):
        verify(changed(), run="x")
    with pytest.raises(RequestError, match="cannot read"):
        verify(tmp_path / "none.jsonl")


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real PostgreSQL on loopback; it refuses to run as root, so it runs as `postgres` then."""
    if not POSTGRES:
        pytest.skip("PostgreSQL is not installed: no /usr/lib/postgresql/*/bin")
    pytest.importorskip("psycopg2", reason="the extra `postgres` is not installed")
    binaries, folder = POSTGRES[-1], Path("/tmp") / f"convmixer-postgres-{os.getpid()}"
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    port = 20000 + os.getpid() % 20000

    def run(*words: str) -> None:
        subprocess.run([*as_user, *words], check=True, cwd="/", stdout=subprocess.DEVNULL, timeout=60)

    options = f"-p {port} -h 127.0.0.1 -k {folder}"
    try:
        run(str(binaries / "initdb"), "-D", str(folder), "-U", "study", "-A", "trust", "--no-sync")
        run(str(binaries / "pg_ctl"), "-D", str(folder), "-o", options, "-l", f"{folder}/log", "-w", "start")
        yield f"postgresql://study@127.0.0.1:{port}/postgres"
    finally:
        run(str(binaries / "pg_ctl"), "-D", str(folder), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_two_workers_on_postgresql_one_of_them_killed(whole: Path, tmp_path: Path, postgres: str) -> None:
    study, out = tiny(tmp_path), tmp_path / "out"
    queue = ("--storage", postgres, "--heartbeat", "1")
    first = start(study, out, *queue)
    deadline = time.monotonic() + 600
    while not (out / "study.json").exists():  # planned and queued
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    second = start(study, out, *queue, "--worker")
    kill_in_the_middle(second, r"epoch 1/2")
    said = finish(first)
    assert numbers(out) == numbers(whole)
    trained = [line for line in said.splitlines() if line.startswith("run  ")]
    assert len(trained) == len(set(trained))
    assert "report " in said
