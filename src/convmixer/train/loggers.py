"""Loggers of a run's metrics, besides its own tables: TensorBoard, Weights & Biases, MLflow.

A logger that fails does not end the run. Loggers that talk to a server do so in a separate thread, so a slow server
does not slow the run down.
"""

import contextlib
import importlib.util
import netrc
import os
import queue
import re
import threading
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from convmixer.errors import RequestError
from convmixer.files import write_atomic
from convmixer.run_folder import RunFolder
from convmixer.text import terminal

CLOSE_SECONDS = 10.0  # how long a run waits at its end for a server
PROJECT = "convmixer"  # the project's name, if the environment does not set another
_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
Say = Callable[[str], None]


class MetricsLogger(Protocol):
    """A logger of metrics."""

    def rewind(self, step: int) -> None:
        """Prepare for steps after this one to be logged again."""
        ...

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of a row of metrics, which also contains its step."""
        ...

    def close(self, finished: bool) -> None:
        """End the log; `finished` is False if the run was stopped and can be resumed."""
        ...


def names_of(setting: str) -> list[str]:
    """Return the names of the loggers in a setting, each once; "csv" and "none" do not name one."""
    return [name for name in dict.fromkeys(setting.split(",")) if name in ("tensorboard", *_OPENERS)]


def check_loggers(setting: str) -> None:
    """Raise RequestError if a logger lacks a package, or an account for which it would ask during the run."""
    for name in names_of(setting):
        if name in _OPENERS and importlib.util.find_spec(name) is None:
            raise RequestError(f"logger {name} needs a package that is missing: pip install 'convmixer[{name}]'")
        if name == "wandb":
            _check_account()


def open_loggers(setting: str, folder: RunFolder, contents: Mapping[str, Any], say: Say) -> Sequence[MetricsLogger]:
    """Return the loggers that a setting names.

    Args:
        setting: Names of loggers, separated by commas.
        folder: The run folder.
        contents: Contents of the run's settings file.
        say: Function that prints a line for the user.
    """
    return [
        TensorBoard(folder.tensorboard, say) if name == "tensorboard" else Sender(name, folder, contents, say)
        for name in names_of(setting)
    ]


class TensorBoard:
    """Writes TensorBoard's event files, which are made at the first row.

    Args:
        path: Folder of the files.
        say: Function that prints a line for the user.
    """

    def __init__(self, path: Path, say: Say) -> None:
        self.path, self.say = path, say
        self._writer: Any = None
        self._purge: int | None = None
        self._failed = False

    def rewind(self, step: int) -> None:
        """Make TensorBoard ignore the rows that were written after a step."""
        self._purge = step + 1

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of a row of metrics."""
        if self._failed:
            return
        try:
            self._add_row(row)
        except (OSError, RuntimeError) as error:
            self._failed = True
            self.say(f"TensorBoard's files in {self.path} can no longer be written ({error}); the run continues")

    def _add_row(self, row: Mapping[str, Any]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.path), purge_step=self._purge)
        for key, value in _numbers(row).items():
            self._writer.add_scalar(key, value, row["step"])
        self._writer.flush()

    def close(self, finished: bool) -> None:
        """End the file."""
        if self._writer is not None and not self._failed:
            self._writer.close()


class Sender:
    """Runs one of Lightning's loggers in a thread.

    A resumed run continues the same log, whose id is in the run folder.

    Args:
        name: "wandb" or "mlflow".
        folder, contents, say: See `open_loggers`.
    """

    def __init__(self, name: str, folder: RunFolder, contents: Mapping[str, Any], say: Say) -> None:
        self.name, self.folder, self.contents, self.say = name, folder, contents, say
        self._id = folder.loggers / f"{name}.id"
        self._rows: queue.SimpleQueue[Mapping[str, Any] | str] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)

    def rewind(self, step: int) -> None:
        """Do nothing: a step that is logged twice has the same numbers."""

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Pass a row to the thread."""
        if self._thread.ident is None:
            self._thread.start()
        self._rows.put(dict(row))
        self._tell()

    def close(self, finished: bool) -> None:
        """End the log, and wait up to CLOSE_SECONDS until the server has everything."""
        if self._thread.ident is None:
            return
        self._rows.put("success" if finished else "failed")
        self._thread.join(CLOSE_SECONDS)
        self._tell()
        if self._thread.is_alive():
            self.say(f"{self.name} does not answer: all metrics are in {terminal(self.folder.metrics)}")

    def _tell(self) -> None:
        while not self._news.empty():
            self.say(self._news.get())

    def _work(self) -> None:
        try:
            logger = self._open()
            while not isinstance(item := self._rows.get(), str):
                logger.log_metrics(_numbers(item), item["step"])
            logger.finalize(item)
            if self.name == "wandb":
                logger.experiment.finish(0 if item == "success" else 1)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self._news.put(f"{self.name} failed, and the run continues without it: {terminal(lines[0])}")

    def _open(self) -> Any:
        """Return Lightning's logger, for a new log or for the existing log of a resumed run."""
        known = self._id.read_text() if self._id.is_file() else ""
        known = known if re.fullmatch(r"[\w-]{1,64}", known) else ""
        logger, where = _OPENERS[self.name](self.folder, known or None)
        if not known:
            logger.log_hyperparams(dict(self.contents["settings"]) | {"data": self.contents["data"]["spec"]})
            write_atomic(self._id, str(logger.version).encode())
        self._news.put(f"{self.name}: {terminal(where())}")
        return logger


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, float)}


def _open_wandb(folder: RunFolder, known: str | None) -> tuple[Any, Callable[[], str]]:
    import wandb
    from pytorch_lightning.loggers import WandbLogger

    folder.loggers.mkdir(exist_ok=True)
    quiet = wandb.Settings(silent=True, console="off")  # with --json, the last line must be ours
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    logger = WandbLogger(
        folder.path.resolve().name, folder.loggers, known, project=project, settings=quiet, reinit="create_new"
    )
    return logger, lambda: str(logger.experiment.dir if logger.experiment.offline else logger.experiment.url)


def _check_account() -> None:
    """Raise RequestError if Weights & Biases would ask for a key in the middle of the run."""
    if os.environ.get("WANDB_MODE", "online") != "online" or any(os.environ.get(name) for name in _KEYS):
        return
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host):
            return
    raise RequestError(f"no account for {host} here: run `wandb login`, or set WANDB_MODE=offline to log to the disk")


def _open_mlflow(folder: RunFolder, known: str | None) -> tuple[Any, Callable[[], str]]:
    import mlflow
    from pytorch_lightning.loggers import MLFlowLogger

    experiment, where = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT), mlflow.get_tracking_uri()
    logger = MLFlowLogger(experiment, folder.path.resolve().name, where, run_id=known)
    shown = re.sub(r"//[^/@]*@", "//", where)  # without a password
    return logger, lambda: f"run {logger.run_id} in {shown}"


_OPENERS: dict[str, Callable[[RunFolder, str | None], tuple[Any, Callable[[], str]]]] = {
    "wandb": _open_wandb,
    "mlflow": _open_mlflow,
}
