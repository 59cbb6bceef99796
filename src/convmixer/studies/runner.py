"""A worker of a study: takes runs from the queue, trains them, stores their records, and writes the report."""

import dataclasses
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from convmixer import records
from convmixer.config import Config, override
from convmixer.errors import RequestError
from convmixer.files import write_atomic
from convmixer.results.runs import read_metrics
from convmixer.run_folder import BEST, MODEL, RunFolder, StudyFolder, is_run
from convmixer.studies.plan import Plan, duration, load_splits, run_name
from convmixer.studies.queue import Queue
from convmixer.studies.schema import Study

REPORT_SEED_PICTURES = 0  # index of the seed whose filters and kernels the report shows


class Runner:
    """A worker of a study.

    Args:
        study: The study.
        spec: The data argument on this machine.
        queue: The study's queue, after `Queue.start`.
        out: The study folder.
        deadline: Time (`time.monotonic`) before which a run must be expected to end, or it is not started.
        reuse: Folder of another study to take finished runs from.
    """

    def __init__(
        self, study: Study, spec: str, queue: Queue, out: Path, deadline: float, reuse: Path | None = None
    ) -> None:
        self.reuse = reuse
        self.chosen: dict[str, dict[str, Any]] = {}  # arm -> settings chosen by its trials
        self.failures: dict[str, str] = {}  # errors of trials
        self.study, self.spec, self.queue, self.out, self.deadline = study, spec, queue, out, deadline
        self.folder = StudyFolder(out)
        self.machine = _machine(records.environment())
        self.plan: Plan = queue.plan()
        self.of_run = {run_name(arm, seed): (arm, seed) for arm, seed in study.runs()}
        self.runs: list[str] = self.plan["runs"]
        self.records = self.folder.records
        write_atomic(self.folder.plan, json.dumps(self.plan, indent=2).encode())

    def config(self, run: str) -> Config:
        """Return the settings of a run, including those that its arm's trials chose."""
        arm, seed = self.of_run[run]
        return override(self.study.config(arm, seed), self.chosen.get(arm, {}))

    def check_data(self) -> None:
        """Check that the data on this machine are those of the plan.

        Raises:
            RequestError: They differ.
        """
        if load_splits(self.study, self.spec).checksum != self.plan["data"]["checksum"]:
            raise RequestError(f"{self.spec} does not hold the data that the study was started with")

    def work(self) -> None:
        """Train runs until none is left or the next one does not fit the budget; then wait for other workers."""
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
                self.write_records()
            elif running and time.monotonic() < self.deadline:
                said = self._wait(running, said)
            else:
                return

    def train(self, run: str) -> dict[str, Any]:
        """Train a run, from its beginning or from its last checkpoint, and return its record."""
        from convmixer.train.run import resume, train

        if found := self._elsewhere(run):
            reused = self._reused(run, found)
            print(f"reused   {run}: {reused['results']['reused_from']}")
            return reused
        arm = self.of_run[run][0]
        folder, build = self.folder.run(run).path, self.plan["arms"][arm]["build"]
        if is_run(folder):
            resume(folder, self.spec, self.study.recipe.device)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # killed before its first file
            recipe_name = f"study {self.study.name}"
            train(self.spec, self.config(run), folder, self.study.recipe, recipe_name, (build[0], build[1]))
        return self._record(run, arm, folder)

    def report(self, against: Path | None = None) -> dict[str, Any]:
        """Write the records and the report on the runs that have ended, and return the command's result.

        Args:
            against: Folder of a study to compare the order of the arms with.
        """
        from convmixer.results.report import write_report

        self.write_records()
        failed = self.failures | self.queue.failures()
        write_atomic(self.folder.failures, json.dumps(failed, indent=2).encode())
        found = write_report(self.out, against)
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
            raise RequestError(f"{run} was not trained on the data that the study was planned with")
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
        if not self.reuse or self.study.tune or not StudyFolder(self.reuse).records.exists():
            return None
        arm, seed = self.of_run[run]
        own, theirs = self.plan, read_plan(self.reuse)
        if theirs.get("tune"):
            return None  # the other study's arms have different, tuned settings
        recipes = [override(Config(), plan["recipe"]) for plan in (theirs, own)]  # older plans lack newer settings
        if recipes[0] != recipes[1] or theirs["data"]["checksum"] != own["data"]["checksum"]:
            return None
        finished = {record.name: record for record in records.read(StudyFolder(self.reuse).records)}
        for name, planned in theirs["arms"].items():
            record = finished.get(run_name(name, seed))
            if record and all(planned[key] == own["arms"][arm][key] for key in ("build", "recipe")):
                return record
        return None

    def _reused(self, run: str, record: records.RunRecord) -> dict[str, Any]:
        """Return the record of another study as a record of this one."""
        assert self.reuse
        arm, theirs = self.of_run[run][0], read_plan(self.reuse)
        results = record.results | {
            "arm": arm,
            "weights": os.path.relpath(self.reuse / record.results["weights"], self.out),
            "reused_from": f"{record.name} of the study {theirs['name']}",
        }
        return dataclasses.asdict(dataclasses.replace(record, name=run, results=results))

    def write_records(self) -> None:
        """Write the records of all runs that have ended, here or elsewhere, and the pictures of their weights."""
        done = self.queue.records()
        lines = [json.dumps(done[run]) + "\n" for run in self.runs if run in done]
        write_atomic(self.records, "".join(lines).encode())
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
        """Return the remaining seconds of a run, from runs of the arm that finished here, else from the probe."""
        arm, config = self.of_run[run][0], self.config(run)
        if self._elsewhere(run):
            return 0.0
        same = [r for r in self.queue.records().values() if _machine(r["environment"]) == self.machine]
        done = [r["results"]["seconds"] for r in same if r["results"]["arm"] == arm and "seconds" in r["results"]]
        share = config.epochs / self.study.config(arm, self.study.seeds[0]).epochs  # of a run: trials may be shorter
        probed = float(self.plan["probes"][arm]["seconds"]) * share
        whole = statistics.median(done) if done else probed
        run_folder = self.folder.run(run)
        epochs = [row["epoch"] for row in read_metrics(run_folder)] if run_folder.metrics.exists() else []
        return whole * (1 - max(epochs, default=0.0) / max(config.epochs, 1))

    def _say_next(self, run: str) -> None:
        done, total = len(self.queue.records()), len(self.runs)
        left = sum(self._estimate(other) for other in self.queue.waiting())
        own = duration(self._estimate(run))
        print(f"\nstudy    run {done + 1} of {total}: {run}, about {own}; about {duration(left)} left in the queue")

    def _wait(self, running: list[str], said: str) -> str:
        text = f"study    waiting for other workers: {', '.join(running)}"
        if text != said:
            print(text)
        time.sleep(min(self.queue.heartbeat_seconds, max(0.1, self.deadline - time.monotonic())))
        return text


def read_plan(folder: Path) -> Plan:
    """Return the plan in a study folder."""
    plan: Plan = json.loads(StudyFolder(folder).plan.read_text(encoding="utf-8"))
    return plan


def _machine(environment: dict[str, Any]) -> list[Any]:
    return [environment.get(key) for key in ("processor", "cores", "gpus")]
