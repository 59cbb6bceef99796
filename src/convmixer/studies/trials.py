"""The trials of a tuned study, which every arm gets before its seeds are trained. They have a separate queue."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from convmixer import records
from convmixer.config import Config, override, to_dict
from convmixer.results.study import StudyResults
from convmixer.studies.plan import trial_name
from convmixer.studies.queue import Queue
from convmixer.studies.runner import Runner
from convmixer.studies.schema import Study


class Trials(Runner):
    """One worker of the trials; see `Runner`."""

    def __init__(self, study: Study, spec: str, queue: Queue, out: Path, deadline: float) -> None:
        super().__init__(study, spec, queue, out, deadline)
        self.tune: dict[str, Any] = self.plan["tune"]
        self.of_run = {trial_name(arm, i): (arm, i) for i in range(self.tune["trials"]) for arm in study.arms}
        self.runs, self.records = self.tune["runs"], self.folder.trials

    def config(self, run: str) -> Config:
        """Return the settings of a trial.

        The trial is scored on images held out of train, and does not read the test set.
        """
        arm, trial = self.of_run[run]
        own = {"test": False, "draw": False, "val_fraction": self.tune["val_fraction"]}
        own |= {"epochs": self.tune["epochs"]} if self.tune["epochs"] else {}
        return override(self.study.config(arm, self.study.seeds[0]), own | self.tune["proposals"][trial])

    def train(self, run: str) -> dict[str, Any]:
        """Train a trial and return its record; if it diverges, the record has no accuracy."""
        arm, trial = self.of_run[run]
        try:
            record = super().train(run)
        except FloatingPointError as error:
            print(f"diverged {run}: {error}")
            record = self._diverged(run, arm, str(error))
        shutil.rmtree(self.folder.run(run).checkpoints, ignore_errors=True)  # trials are not continued
        return record | {"results": record["results"] | {"trial": trial}}

    def _diverged(self, run: str, arm: str, why: str) -> dict[str, Any]:
        config, data = self.config(run), self.plan["data"]
        results = {"arm": arm, "val_top1": None, "test_top1": None, "diverged": why}
        record = records.RunRecord(run, records.command_line(), to_dict(config), data, results, config.seed)
        return dataclasses.asdict(record)

    def choose(self) -> dict[str, dict[str, Any]]:
        """Return arm -> the settings of its best trial; {} while trials are missing."""
        self.write_records()
        if self.queue.waiting() or self.queue.running():
            print("trials   not all are finished: an arm's seeds are trained only after all of its trials")
            return {}
        results = StudyResults(self.out)
        chosen = {arm: self.tune["proposals"][results.chosen(arm) or 0] for arm in self.study.arms}
        for arm, settings in chosen.items():
            values = ", ".join(f"{key} {value}" for key, value in settings.items()) or "the shared recipe"
            print(f"chosen   {arm}: {values}")
        return chosen
