"""Run a study: plan, queue, train every arm and seed, keep the records, write the report."""

import dataclasses
import json
import math
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from convmixer import records
from convmixer.config import Config, override, parse_seconds
from convmixer.errors import RequestError
from convmixer.files import write_atomic
from convmixer.results.runs import read_metrics
from convmixer.run_folder import BEST, MODEL, STUDY, RunFolder, StudyFolder, is_run
from convmixer.studies.plan import Plan, duration, identity, load_splits, make_plan, probe_all, run_name
from convmixer.studies.queue import HEARTBEAT_SECONDS, Queue
from convmixer.studies.schema import Study, load_study

REPORT_SEED_PICTURES = 0  # index of the seed whose filters and kernels the report shows


def compare(
    name: str,
    data: str | None = None,
    out: Path | None = None,
    *,
    resume: bool = False,
    budget: str | None = None,
    dry_run: bool = False,
    worker: bool = False,
    storage: str | None = None,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    reuse: Path | None = None,
) -> dict[str, Any]:
    """Train the missing runs of a study and write its report.

    Args:
        name: A shipped study, or the path of a study file.
        data: The data argument; None: the study's own.
        out: Study folder; None: `studies/<name>`.
        resume: Continue the study in that folder.
        budget: Start only runs that would end within this time, such as "2h"; None: the study's own, or no limit.
        dry_run: Probe and print the plan; train nothing.
        worker: Take runs from a queue that another process started.
        storage: SQLAlchemy URL of the queue; None: SQLite in the study folder.
        heartbeat_seconds: Time between this worker's heartbeats.
        reuse: Folder of another study; runs that finished there with the same model, settings, seed and data are
            not trained again.

    Returns:
        `report`, `records` (paths), `verdicts` (one mapping per claim), `missing` and `failed` (run names); for a dry
        run `arms` and `seconds_total`.

    Raises:
        RequestError: The study, the data or the folder is wrong; nothing was trained.
    """
    began = time.monotonic()
    study = load_study(name)
    if reuse and not StudyFolder(reuse).plan.exists():
        raise RequestError(f"{reuse} holds no study to reuse: there is no {STUDY}")
    spec, out = data or study.data, out or Path("studies") / study.name
    if dry_run:
        return _dry_run(study, spec)
    _check_folder(out, study, resume or worker)
    limit = budget or study.budget
    allowed = parse_seconds(limit, "--budget") if limit else math.inf
    out.mkdir(parents=True, exist_ok=True)
    queue = Queue(storage or f"sqlite:///{StudyFolder(out.resolve()).queue}", identity(study), heartbeat_seconds)
    starts = not worker and not queue.exists()
    if not (starts or worker or resume):
        raise RequestError("that queue holds the study already: continue it with --resume, or join it with --worker")
    if starts and StudyFolder(out).plan.exists():
        _rebuild_queue(queue, out)
        starts = False
    elif starts:
        plan = make_plan(study, spec)
        _say_plan(plan)
        plan["probes"] = probe_all(plan, study)
        queue.start(plan["runs"], plan)
    runner = Runner(study, spec, queue, out, began + allowed, reuse)
    if not starts:
        runner.check_data()
    if resume:
        queue.retry_failures()
    runner.work()
    return runner.report()


class Runner:
    """One worker of a study.

    Args:
        study: The study.
        spec: The data argument; workers on other machines may keep the same data elsewhere.
        queue: Its queue, started.
        out: The study folder.
        deadline: Start only runs that would end before this (`time.monotonic`).
        reuse: Folder of another study to take finished runs from.
    """

    def __init__(
        self, study: Study, spec: str, queue: Queue, out: Path, deadline: float, reuse: Path | None = None
    ) -> None:
        self.reuse = reuse
        self.study, self.spec, self.queue, self.out, self.deadline = study, spec, queue, out, deadline
        self.folder = StudyFolder(out)
        self.machine = _machine(records.environment())
        self.plan: Plan = queue.plan()
        self.of_run = {run_name(arm, seed): (arm, seed) for arm, seed in study.runs()}
        write_atomic(self.folder.plan, json.dumps(self.plan, indent=2).encode())

    def check_data(self) -> None:
        """Check that the data here are those of the plan.

        Raises:
            RequestError: They differ.
        """
        if load_splits(self.study, self.spec).checksum != self.plan["data"]["checksum"]:
            raise RequestError(f"{self.spec} holds other data than the study was started with")

    def work(self) -> None:
        """Take runs until none is left or the next does not fit the budget; then wait for other workers."""
        said = ""
        while True:
            self.queue.recover()
            waiting, running = self.queue.waiting(), self.queue.running()
            if waiting and time.monotonic() + self._estimate(waiting[0]) > self.deadline:
                print(f"budget   {waiting[0]} would take {duration(self._estimate(waiting[0]))}: not started")
                return
            if waiting:
                self._say_next(waiting[0])
                self.queue.take(self.train)
                self._write_records()
            elif running and time.monotonic() < self.deadline:
                said = self._wait(running, said)
            else:
                return

    def train(self, run: str) -> dict[str, Any]:
        """Return the record of a run, trained from its beginning or its last checkpoint."""
        from convmixer.train.run import resume, train

        if found := self._elsewhere(run):
            reused = self._reused(run, found)
            print(f"reused   {run}: {reused['results']['reused_from']}")
            return reused
        arm, seed = self.of_run[run]
        folder, build = self.folder.run(run).path, self.plan["arms"][arm]["build"]
        if is_run(folder):
            resume(folder, self.spec, self.study.recipe.device)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # killed before its first file
            config = self.study.config(arm, seed)
            recipe_name = f"study {self.study.name}"
            train(self.spec, config, folder, self.study.recipe, recipe_name, (build[0], build[1]))
        return self._record(run, arm, folder)

    def report(self) -> dict[str, Any]:
        """Write the records and the report on the runs that have ended, and return the command's result."""
        from convmixer.results.report import write_report

        self._write_records()
        failed = self.queue.failures()
        write_atomic(self.folder.failures, json.dumps(failed, indent=2).encode())
        found = write_report(self.out)
        for line in found["lines"]:
            print(line)
        for run, error in failed.items():
            print(f"failed   {run}: {error}")
        print(f"report   {found['report']}")
        return {
            "report": str(found["report"]),
            "records": str(self.folder.records),
            "verdicts": found["verdicts"],
            "missing": found["missing"],
            "failed": sorted(failed),
        }

    # Records

    def _record(self, run: str, arm: str, folder: Path) -> dict[str, Any]:
        record = records.read(RunFolder(folder).record)[-1]
        if record.data["checksum"] != self.plan["data"]["checksum"]:
            raise RequestError(f"{run} was trained on other data than the study was planned with")
        results = record.results | {
            "arm": arm,
            "macs": self.plan["arms"][arm]["macs"],
            "weights": self.folder.run(run).weights(BEST).relative_to(self.out).as_posix(),
            "history": read_metrics(RunFolder(folder)),
        }
        full = dataclasses.replace(record, name=run, results=results)
        return dataclasses.asdict(full)

    def _elsewhere(self, run: str) -> records.RunRecord | None:
        """Return the record of the same model, settings, seed and data in the folder to reuse."""
        if not self.reuse or not StudyFolder(self.reuse).records.exists():
            return None
        arm, seed = self.of_run[run]
        own, theirs = self.plan, _read_plan(self.reuse)
        recipes = [override(Config(), plan["recipe"]) for plan in (theirs, own)]  # older ones lack newer settings
        if recipes[0] != recipes[1] or theirs["data"]["checksum"] != own["data"]["checksum"]:
            return None
        finished = {record.name: record for record in records.read(StudyFolder(self.reuse).records)}
        for name, planned in theirs["arms"].items():
            record = finished.get(run_name(name, seed))
            if record and all(planned[key] == own["arms"][arm][key] for key in ("build", "recipe")):
                return record
        return None

    def _reused(self, run: str, record: records.RunRecord) -> dict[str, Any]:
        """Return another study's record, changed to belong to this one."""
        assert self.reuse
        arm, theirs = self.of_run[run][0], _read_plan(self.reuse)
        results = record.results | {
            "arm": arm,
            "weights": os.path.relpath(self.reuse / record.results["weights"], self.out),
            "reused_from": f"{record.name} of the study {theirs['name']}",
        }
        return dataclasses.asdict(dataclasses.replace(record, name=run, results=results))

    def _write_records(self) -> None:
        done = self.queue.records()
        lines = [json.dumps(done[run]) + "\n" for run in self.plan["runs"] if run in done]
        write_atomic(self.folder.records, "".join(lines).encode())
        self._draw(done)

    def _draw(self, done: dict[str, Any]) -> None:
        """Draw filters and kernels of every arm's first seed, once, while the weights are available."""
        from convmixer.results.study_plots import draw_weights

        for arm in self.plan["arms"]:
            run = run_name(arm, self.plan["seeds"][REPORT_SEED_PICTURES])
            weights = self.folder.run(run).weights(BEST) / MODEL
            if run in done and weights.exists():
                draw_weights(weights, self.folder.pictures, arm)

    # Time

    def _estimate(self, run: str) -> float:
        """Return the remaining seconds of a run, from the arm's finished runs here, else from the probe."""
        arm, seed = self.of_run[run]
        if self._elsewhere(run):
            return 0.0
        same = [r for r in self.queue.records().values() if _machine(r["environment"]) == self.machine]
        done = [r["results"]["seconds"] for r in same if r["results"]["arm"] == arm]
        whole = statistics.median(done) if done else float(self.plan["probes"][arm]["seconds"])
        run_folder = self.folder.run(run)
        epochs = [row["epoch"] for row in read_metrics(run_folder)] if run_folder.metrics.exists() else []
        return whole * (1 - max(epochs, default=0.0) / max(self.study.config(arm, seed).epochs, 1))

    def _say_next(self, run: str) -> None:
        done, total = len(self.queue.records()), len(self.plan["runs"])
        left = sum(self._estimate(other) for other in self.queue.waiting())
        own = duration(self._estimate(run))
        print(f"\nstudy    run {done + 1} of {total}: {run}, about {own}; about {duration(left)} left in the queue")

    def _wait(self, running: list[str], said: str) -> str:
        text = f"study    waiting for other workers: {', '.join(running)}"
        if text != said:
            print(text)
        time.sleep(min(self.queue.heartbeat_seconds, max(0.1, self.deadline - time.monotonic())))
        return text


def _read_plan(folder: Path) -> Plan:
    plan: Plan = json.loads(StudyFolder(folder).plan.read_text(encoding="utf-8"))
    return plan


def _rebuild_queue(queue: Queue, out: Path) -> None:
    """Rebuild the queue from plan and records if the folder has none, as after a git clone."""
    plan, path = _read_plan(out), StudyFolder(out).records
    done = {record.name: dataclasses.asdict(record) for record in (records.read(path) if path.exists() else ())}
    queue.start(plan["runs"], plan, done)
    print(f"study    its queue is missing in {out}: rebuilt from the plan and {len(done)} records")


def _machine(environment: dict[str, Any]) -> list[Any]:
    return [environment.get(key) for key in ("processor", "cores", "gpus")]


def _dry_run(study: Study, spec: str) -> dict[str, Any]:
    plan = make_plan(study, spec)
    _say_plan(plan)
    probes = probe_all(plan, study)
    total = sum(probes[arm]["seconds"] for arm, _ in study.runs())
    print(f"{len(plan['runs'])} runs, about {duration(total)} on this machine with one worker; nothing was trained")
    keys = ("parameters", "macs")
    arms = {name: {key: arm[key] for key in keys} | probes[name] for name, arm in plan["arms"].items()}
    return {"arms": arms, "seconds_total": total, "runs": plan["runs"]}


def _say_plan(plan: Plan) -> None:
    data = plan["data"]
    print(f"study    {plan['title']}")
    print(f"data     {data['name']}: {data['train']} train, {data['val']} val, {data['test']} test")
    if plan["unequal"]:
        changed = [name for name, arm in plan["arms"].items() if arm["recipe"]]
        print(f"unequal  these arms change the recipe: {', '.join(changed) or 'none'}")


def _check_folder(out: Path, study: Study, goes_on: bool) -> None:
    """Raise an error instead of mixing two studies in one folder, or continuing one without --resume."""
    if not StudyFolder(out).plan.exists():
        if out.exists() and any(out.iterdir()) and not goes_on:
            raise RequestError(f"{out} is not empty: choose another --out")
        return
    if not goes_on:
        raise RequestError(f"{out} holds a study already: continue it with --resume, or choose another --out")
    plan = _read_plan(out)
    if plan["name"] != study.name:
        raise RequestError(f"{out} holds the study {plan['name']}: choose another --out")
    if plan["identity"] != identity(study):
        raise RequestError(f"the study {study.name} has changed since {out} was started: choose another --out")
