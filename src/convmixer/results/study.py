"""The results in a study folder: arms, values per seed, intervals, verdicts. Reads only the plan and the records."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convmixer import records
from convmixer.results.statistics import Interval, mean_interval, paired_difference, verdict
from convmixer.run_folder import STUDY, StudyFolder, study_of_weights

STRUCTURE = "kernel_structure"  # of depthwise kernels; 0 if they are random
SPEEDS = ("train_images_per_second", "infer_images_per_second")  # from the probe; runs may have shared machines


@dataclass(frozen=True)
class ArmRow:
    """One line of the table of arms; None if nothing is measured yet.

    Args:
        name, label: Name and label of the arm.
        parameters, macs: Parameters of the model, and its MACs per image.
        test: Interval of test top-1 in percent over the seeds.
        train_speed, infer_speed: Images per second, from the probe.
        seconds: Time of one run at that speed.
        memory: Bytes that training needs, without libraries and data, from the probe.
    """

    name: str
    label: str
    parameters: int
    macs: int
    test: Interval | None
    train_speed: float
    infer_speed: float
    seconds: float
    memory: int


class StudyResults:
    """The results of a study so far.

    Args:
        folder: The study folder.

    Raises:
        ValueError: The folder holds no study, or a record cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.plan: dict[str, Any] = json.loads(StudyFolder(folder).plan.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no readable {STUDY}: {error}") from error
        self.folder = folder
        path = StudyFolder(folder).records
        self.records = {record.name: record for record in records.read(path)} if path.exists() else {}
        path = StudyFolder(folder).trials
        self.trials = list(records.read(path)) if path.exists() else []
        failures = StudyFolder(folder).failures
        self.failures: dict[str, str] = json.loads(failures.read_text("utf-8")) if failures.exists() else {}

    @property
    def missing(self) -> list[str]:
        """Trials and runs of the plan without a record."""
        tried = {record.name for record in self.trials}
        trials = [trial for trial in (self.tune or {"runs": ()})["runs"] if trial not in tried]
        return trials + [run for run in self.plan["runs"] if run not in self.records]

    @property
    def tune(self) -> dict[str, Any] | None:
        """The plan's entry on trials; None if the study tunes nothing."""
        found: dict[str, Any] | None = self.plan.get("tune")
        return found

    def of_arm(self, arm: str) -> list[records.RunRecord]:
        """Return the records of an arm in the order of their seeds."""
        found = [record for record in self.records.values() if record.results["arm"] == arm]
        return sorted(found, key=lambda record: record.seed or 0)

    def tried(self, arm: str) -> dict[int, float | None]:
        """Return trial -> validation top-1 in percent, for an arm's trials that have ended; None: it diverged."""
        found = [t.results for t in self.trials if t.results["arm"] == arm]
        return {r["trial"]: r["val_top1"] for r in sorted(found, key=lambda r: int(r["trial"]))}

    def chosen(self, arm: str) -> int | None:
        """Return the trial with an arm's best validation accuracy, of equal ones the first; None if there is none."""
        values = {trial: value for trial, value in self.tried(arm).items() if value is not None}
        return max(values, key=lambda trial: values[trial]) if values else None

    def values(self, arm: str, measure: str) -> dict[int, float]:
        """Return seed -> value of an arm's measure. For a speed, the keys are the rounds of the probe."""
        if measure in SPEEDS:
            return {i: float(turn[measure]) for i, turn in enumerate(self.plan["probes"][arm]["rounds"])}
        known = {r.seed or 0: r.results.get(measure) for r in self.of_arm(arm)}  # None: old, or without such kernels
        return {seed: float(value) for seed, value in known.items() if value is not None}

    def weights_of(self, arm: str, seed: int) -> tuple[Path, str] | None:
        """Return the study folder that holds a run's weights, and the arm's name there; None if it has not ended.

        A run that was reused from another study has its weights, and the pictures of them, in that study's folder.
        """
        record = next((record for record in self.of_arm(arm) if record.seed == seed), None)
        if record is None or "weights" not in record.results:
            return None
        study, run = study_of_weights(self.folder / record.results["weights"])
        return study.path, run.rpartition("-seed")[0]

    def rows(self) -> list[ArmRow]:
        """Return the table of arms, in the study's order."""
        return [self._row(name, arm) for name, arm in self.plan["arms"].items()]

    def _row(self, name: str, arm: dict[str, Any]) -> ArmRow:
        test = list(self.values(name, "test_top1").values())
        probe = self.plan["probes"][name]
        return ArmRow(
            name,
            arm["label"],
            arm["parameters"],
            arm["macs"],
            mean_interval(test) if test else None,
            probe["train_images_per_second"],
            probe["infer_images_per_second"],
            probe["seconds"],
            probe["peak_memory_bytes"],
        )

    def verdicts(self) -> list[dict[str, Any]]:
        """Return every claim with its difference (first - second), interval, number of pairs and verdict."""
        return [self._judge(claim) for claim in self.plan["claims"]]

    def _judge(self, claim: dict[str, Any]) -> dict[str, Any]:
        measure = claim["measure"]
        first = self.values(claim["first"], measure)
        second = self.values(claim["second"], measure) if claim["second"] else dict.fromkeys(first, 0.0)
        difference = paired_difference(first, second)
        finite = difference is not None and difference.n > 1
        return claim | {
            "difference": difference.mean if difference else None,
            "low": difference.low if difference and finite else None,
            "high": difference.high if difference and finite else None,
            "n": difference.n if difference else 0,
            "verdict": verdict(difference, claim["relation"], claim["matters"]),
        }

    def curve(self, arm: str, key: str) -> tuple[list[float], list[list[float]]]:
        """Return the epochs, and for each epoch the values of all seeds; both are empty if `key` was not measured."""
        by_epoch: dict[float, list[float]] = {}
        for record in self.of_arm(arm):
            for row in record.results["history"]:
                if key in row:
                    by_epoch.setdefault(row["epoch"], []).append(row[key])
        epochs = sorted(by_epoch)
        return epochs, [by_epoch[epoch] for epoch in epochs]
