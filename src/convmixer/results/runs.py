"""Reads settings, results and metrics of finished and unfinished runs from their folders."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from convmixer import records
from convmixer.config import Config, override, to_dict
from convmixer.errors import RequestError, shown
from convmixer.run_folder import RunFolder, intact

COLUMNS = ("epoch", "train_loss", "val_loss", "top1", "seconds")


def read_metrics(run: RunFolder) -> list[dict[str, float]]:
    """Return a row per epoch of a run: its number, losses, val top-1 and seconds, as far as they were measured."""
    with run.metrics.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: float(row[key]) for key in COLUMNS if row.get(key)} for row in rows]


@dataclass(frozen=True)
class RunSummary:
    """One run. A field is None if it was not measured, or has not been measured yet.

    Args:
        path: The run folder.
        label: Name of the run in tables.
        settings: All settings by name, and the arguments of the model.
        data: Name and checksum of the data.
        parameters: Number of the model's parameters.
        epochs: Epochs trained so far.
        test_top1, val_top1: Accuracy in percent; for an unfinished run, val_top1 is the best so far.
        test_n, val_n: Number of images in the test and the val split.
        seconds: Training time.
        images_per_second: Training speed.
        rows: The result of `read_metrics`.
        finished: Whether it has a record.
    """

    path: Path
    label: str
    settings: dict[str, Any]
    data: tuple[str, str]
    parameters: int | None
    epochs: float
    test_top1: float | None
    test_n: int | None
    val_top1: float | None
    val_n: int | None
    seconds: float | None
    images_per_second: float | None
    rows: list[dict[str, float]]
    finished: bool


def read_run(path: Path, label: str) -> RunSummary:
    """Return the summary of a run folder.

    Raises:
        RequestError: A file of the folder is damaged.
    """
    run = RunFolder(path)
    try:
        record = records.read(run.record)[-1] if run.record.exists() else None
        text = run.config.read_text(encoding="utf-8")
        if not intact(text):
            raise ValueError(f"{run.config.name} was damaged or changed after it was written")
        contents = yaml.safe_load(text)
        settings = to_dict(override(Config(), contents["settings"]))
        settings |= {f"model's {name}": value for name, value in contents["build"]["arguments"].items()}
        rows = read_metrics(run) if run.metrics.exists() else []
        data = (str(contents["data"]["name"]), str(contents["data"]["checksum"]))
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, yaml.YAMLError) as error:
        raise RequestError(f"{path} cannot be read: {shown(' '.join(str(error).split()), 200)}") from error
    results = record.results if record else _so_far(contents["data"], rows)

    def real(key: str) -> float | None:
        return _number(results.get(key))

    def whole(key: str) -> int | None:
        value = real(key)
        return None if value is None else int(value)

    return RunSummary(
        path,
        label,
        settings,
        data,
        parameters=whole("parameters"),
        epochs=real("epochs") or 0.0,
        test_top1=real("test_top1"),
        test_n=whole("test_n"),
        val_top1=real("val_top1"),
        val_n=whole("val_n"),
        seconds=real("seconds"),
        images_per_second=real("images_per_second"),
        rows=rows,
        finished=record is not None,
    )


def _so_far(data: dict[str, Any], rows: list[dict[str, float]]) -> dict[str, Any]:
    """Return the results of a run that has not ended."""
    best = max((row["top1"] for row in rows if "top1" in row), default=None)
    last = rows[-1] if rows else {}
    return {"val_top1": best, "val_n": data.get("val"), "epochs": last.get("epoch"), "seconds": last.get("seconds")}


def _number(value: object) -> float | None:
    real = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if real else None  # type: ignore[arg-type]


def labels_of(paths: list[Path]) -> list[str]:
    """Return short names that distinguish folders: as few of their last parts as needed."""
    whole = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            return names
    return ["/".join(parts) for parts in whole]
