"""Writes and reads the files of a run: settings, metrics, log, record. Also makes the text of its model card."""

import csv
import io
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from convmixer import records
from convmixer.config import Config, difference, override, to_dict
from convmixer.data.datasets import DataSplits
from convmixer.errors import RequestError
from convmixer.files import naming, write_atomic
from convmixer.preprocess import Preprocessing
from convmixer.run_folder import CONFIG, LOCK, METRICS, MISTAKES, RECORD, STEPS, RunFolder, intact, is_run, sealed
from convmixer.text import markdown, terminal

COLUMNS = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "val_loss",
    "top1",
    "top5",
    "images_per_second",
    "loader_share",
    "seconds",
)
STEP_COLUMNS = ("step", "train_loss", "lr", "images_per_second")
_NEEDED = ("command", "recipe", "settings", "data", "classes", "preprocessing", "build", "schedule")


class RunFiles(RunFolder):
    """A run folder that training writes to.

    Args:
        path: The folder.
    """

    @classmethod
    def create(cls, path: Path | None, name: str) -> "RunFiles":
        """Return a new folder: `path`, or the next free `runs/<name>-<number>`.

        Raises:
            RequestError: The folder holds something already.
        """
        path = path or _next_free(name)
        check_empty(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"cannot make the run folder {path}: {error.strerror}") from error
        return cls(path)

    def write_config(self, contents: Mapping[str, Any]) -> None:
        """Write the settings."""
        text = yaml.safe_dump(dict(contents), sort_keys=False, allow_unicode=True)
        write_atomic(self.config, sealed(text).encode())

    def read_config(self) -> dict[str, Any]:
        """Return the contents of the settings file.

        Raises:
            RequestError: The folder is not a run, or its settings are damaged.
        """
        text = self._read_text(self.config, "is not a run folder")
        if not text.endswith("\n"):
            raise RequestError(f"{self.config} is cut or damaged: its last line is incomplete")
        if not intact(text):
            raise RequestError(
                f"{self.config} was damaged or changed after it was written: copy it again, or if you changed it on "
                "purpose, delete its last line"
            )
        try:
            contents = dict(yaml.safe_load(text))
            override(Config(), contents["settings"])
            missing = [key for key in _NEEDED if key not in contents]
        except (yaml.YAMLError, TypeError, ValueError, KeyError, AttributeError) as error:
            why = str(error) if isinstance(error, RequestError) else "it is cut or damaged"
            raise RequestError(f"{self.config} cannot be read: {why}") from error
        if missing:
            raise RequestError(f"{self.config} is cut or damaged: it has no {missing[0]}")
        return contents

    def read_results(self) -> dict[str, Any] | None:
        """Return the results of a finished run, or None if it is not finished.

        If its record is damaged, a line says so, and the run does not count as finished.
        """
        if not self.record.exists():
            return None
        try:
            found = records.read(self.record)
        except (OSError, ValueError) as error:
            print(f"{self.record} is damaged ({error}): it will be written again")
            return None
        if not found:
            print(f"{self.record} is empty: it will be written again")
        return found[-1].results if found else None

    def _read_text(self, path: Path, otherwise: str) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"{path} is cut or damaged: it is not text") from error
        except OSError as error:
            raise RequestError(f"{self.path} {otherwise}: cannot read {path.name} ({error.strerror})") from error

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write all metrics again, one row per epoch. Rewriting the small file ensures that no row is in it twice."""
        write_atomic(self.metrics, _table(COLUMNS, rows))

    def write_steps(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the table of steps again, one row for every few steps."""
        write_atomic(self.steps, _table(STEP_COLUMNS, rows))

    def log(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Add an event to the log."""
        line = {"time": round(time.time(), 3), "event": event, "step": step, **values}
        with naming(self.log_file), self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind_log(self, step: int) -> None:
        """Remove the events after a step from the log, because these steps are taken again."""
        path = self.log_file
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
        kept = [line for line in lines if _step(line) <= step]
        write_atomic(path, "".join(line + "\n" for line in kept).encode())


def check_empty(path: Path) -> None:
    """Check that a new run can be written to a path.

    Files of a process that was killed before it wrote its first settings do not count.

    Raises:
        RequestError: The path is a file, or a folder that holds something.
    """
    taken = path.exists() and not path.is_dir()
    if taken or (path.exists() and any(child.name[0] != "." and child.name != LOCK for child in path.iterdir())):
        hint = f"continue it with --resume {path}" if is_run(path) else "choose another --out"
        raise RequestError(f"{path} is not empty: {hint}")


def describe(
    config: Config,
    asked: Config,
    recipe: Config | None,
    recipe_name: str | None,
    spec: str,
    data: DataSplits,
    preprocessing: Preprocessing,
    build: tuple[str, dict[str, Any]] | None,
    schedule: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the contents of the settings file: everything needed to repeat, continue or judge the run.

    `asked` holds the settings as the user gave them, some of them "auto". In `config` each "auto" is replaced by the
    value that was chosen for the data and the machine. Differences from the recipe are those of
    `asked`, so an "auto" that was resolved is not one.
    """
    changed = difference(recipe or Config(), asked)
    sizes = {split: len(images) if (images := getattr(data, split)) else 0 for split in ("train", "val", "test")}
    return {
        "command": records.command_line(),
        "recipe": recipe_name,
        "settings": to_dict(config),
        "differs_from_recipe": {name: {"recipe": old, "here": new} for name, (old, new) in changed.items()},
        "data": {"spec": spec, "name": data.name, "checksum": data.checksum, **sizes, "notes": list(data.notes)},
        "classes": list(data.classes),
        "preprocessing": _plain(asdict(preprocessing)),
        "build": None if build is None else {"name": build[0], "arguments": build[1]},
        "schedule": dict(schedule),
        "environment": records.environment(),
    }


def model_card(config: Mapping[str, Any], results: Mapping[str, Any], mistakes: bool = False) -> str:
    """Return the model card of a run from the settings file's contents and the record's results.

    Args:
        config: Contents of the settings file.
        results: Results in the record.
        mistakes: Whether the run folder holds the page of mistakes.
    """
    data, p = config["data"], config["preprocessing"]
    lines = [
        f"# {config['build']['name'] if config['build'] else config['settings']['model']} on {data['name']}",
        "",
        f"Trained with `{terminal(config['command']).replace('`', chr(39))}`.",
        "",
        "## Results",
        "",
        "| split | images | used for | top-1 % | top-5 % |",
        "|---|---|---|---|---|",
        f"| train | {data['train']} | training | | |",
    ]
    if data["val"]:
        lines.append(f"| val | {data['val']} | choosing the epoch | {_show(results, 'val')} |")
    if data["test"] and results["test_n"]:
        lines.append(f"| test | {data['test']} | read once, at the end | {_show(results, 'test')} |")
    test_set = "The test set was not used to choose anything." if results["test_n"] else "The test set was not read."
    lines += [
        "",
        f"Weights measured: {results['chosen']}. {test_set}",
        *[f"- {markdown(note)}" for note in data["notes"]],
        "",
        "## Use",
        "",
        "    convmixer predict RUN IMAGES",
        "    convmixer val RUN",
        "",
        f"Input: {p['img_size']} x {p['img_size']} px, {p['in_chans']} channel(s), mean {p['mean']}, std {p['std']}, "
        f"{p['interpolation']} resizing, crop {p['crop_pct']}. `convmixer` applies this itself.",
        f"Classes ({len(config['classes'])}): {', '.join(map(markdown, config['classes'][:50]))}"
        + (" ..." if len(config["classes"]) > 50 else ""),
        "",
        "## Training",
        "",
        f"{results['epochs']:g} epochs of {config['schedule']['steps_per_epoch']} steps, seed "
        f"{config['settings']['seed']}, {results['seconds']:.0f} s on {config['environment']['processor']} "
        f"({results['images_per_second']:.0f} images per second, {results['precision']}, {results['kernels']}). "
        f"All settings are in {CONFIG}, epochs in {METRICS}, steps in {STEPS}, the record in {RECORD}.",
        "",
        "![curves](pictures/curves.png)",
        "",
        *([f"[The mistakes, with their images]({MISTAKES})", ""] if mistakes else []),
    ]
    return "\n".join(lines)


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _round(row.get(key)) for key in columns} for row in rows)
    return text.getvalue().encode()


def _next_free(name: str) -> Path:
    numbers = itertools.count(1)
    return next(path for number in numbers if not (path := Path("runs") / f"{name}-{number}").exists())


def _show(results: Mapping[str, Any], split: str) -> str:
    return f"{results[f'{split}_top1']:.2f} | {results[f'{split}_top5']:.2f}"


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _round(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # truncated by a kill
