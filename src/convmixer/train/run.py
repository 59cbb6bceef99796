"""`train` trains a model and writes a run folder. `resume` continues a run as if it had never stopped."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from convmixer._version import __version__
from convmixer.config import Config, difference, override, parse_seconds, to_dict
from convmixer.device import choose_device
from convmixer.errors import RequestError
from convmixer.files import remove_leftovers
from convmixer.preprocess import Preprocessing
from convmixer.run_folder import is_run
from convmixer.train.checkpoint import load_checkpoint
from convmixer.train.distributed import check_equal, everywhere, on_first, process_group, rank
from convmixer.train.folder import RunFiles, check_empty, describe
from convmixer.train.lock import RunLock
from convmixer.train.loggers import check_loggers
from convmixer.train.plans import schedule_of
from convmixer.train.session import OnEpoch, Run, summary
from convmixer.train.setup import Build, Job, prepare

# settings that `resume` may change
CHANGEABLE = ("epochs", "max_time", "workers", "device", "max_bad_fraction", "logger")
LEAST_SECONDS = 2.0  # least time that a run needs after its data are read


def train(
    data: str,
    config: Config,
    out: Path | None = None,
    recipe: Config | None = None,
    recipe_name: str | None = None,
    build: Build | None = None,
    on_epoch: OnEpoch | None = None,
    quiet: bool = False,
    started: float | None = None,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Train a model and return the result; the run folder holds everything about it.

    Args:
        data: The data argument.
        config: Resolved settings.
        out: New or empty folder; None: the next free `runs/<name>-<number>`, named after the recipe or, without one,
            the data.
        recipe: The recipe's settings, to report differences from; None: the defaults.
        recipe_name: The recipe's name.
        build: Name and arguments for `create_model`, instead of `config.model`.
        on_epoch: Called with an epoch's row of metrics when the row is on disk; if it raises, the run ends.
        quiet: Do not print settings, epochs and results.
        started: When the time of `max_time` began, in seconds since 1970; None: now.
        callbacks: Lightning's callbacks. Lightning sees each stage as one epoch, so use their hooks for steps.

    Returns:
        `run` (the folder), `val_top1`, `test_top1` (percent, None without such a split), `epochs`, `seconds`,
        `images_per_second`.

    Raises:
        RequestError: The settings, the data or the folder cannot be used.
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C. A checkpoint is saved then; if the signal also ended a
            process that loads images, the last checkpoint is kept instead.
    """
    started = time.time() if started is None else started
    with _processes(config) as restarted:
        if out is not None and restarted and on_first(lambda: is_run(out)):
            return _continue(RunFiles(out), data, None, on_epoch, callbacks, started)
        on_first(lambda: check_loggers(config.logger))
        if out is not None:
            on_first(lambda: check_empty(out))  # before the data are read; checked again below, under the lock
        job = everywhere(lambda: prepare(data, config, build))
        _check_equal(job)
        seconds = on_first(lambda: _budget(config, started))
        name = recipe_name or data.rstrip("/").rpartition("/")[2]
        folder = on_first(lambda: RunFiles.create(out, name))
        schedule = schedule_of(job.config, job.steps_per_epoch, seconds)
        contents = describe(
            job.config, config, recipe, recipe_name, job.spec, job.data, job.preprocessing, job.build, schedule
        )
        with _alone(folder) as lock:
            on_first(lambda: check_empty(folder.path))  # another process may have trained there since
            run = Run(job, folder, contents, started, lock, on_epoch, quiet, callbacks)
            run.begin()
            return run.to_the_end()


def _budget(config: Config, started: float) -> float | None:
    """Return the seconds that a run gets, or None if only its epochs count.

    Raises:
        RequestError: The time is over before the first step.
    """
    seconds, spent = parse_seconds(config.max_time) if config.max_time else None, time.time() - started
    if seconds and spent + LEAST_SECONDS > seconds:
        raise RequestError(
            f"max_time {config.max_time} is too short: starting and reading the data took {spent:.1f} s, and the end "
            f"of a run takes {LEAST_SECONDS:g} s or more: set a longer max_time"
        )
    return seconds


def resume(
    path: Path,
    data: str | None = None,
    device: str | None = None,
    max_bad_fraction: float | None = None,
    on_epoch: OnEpoch | None = None,
    changes: Mapping[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    started: float | None = None,
) -> dict[str, Any]:
    """Continue a run from its newest checkpoint and return the result, as `train` does.

    On the same machine the weights end up the same as without the stop, bit for bit. A finished run is not changed:
    its result is returned. Damaged checkpoints are named, and the newest intact one is used.

    Args:
        path: The run folder.
        data: Its data on this machine; None: the data argument or path that the run recorded.
        device: Device to compute on; None: the one that the run recorded.
        max_bad_fraction: Share of unreadable images allowed from now on; None: as before.
        on_epoch, callbacks, started: As in `train`.
        changes: New values of settings in `CHANGEABLE`. New `epochs` or `max_time` extend a finished run too.

    Raises:
        RequestError: The folder is not a run, another process trains in it, its data have changed, or no checkpoint
            can be read.
    """
    folder = RunFiles(path)
    given = {"device": device, "max_bad_fraction": max_bad_fraction, **(changes or {})}
    changes = {name: value for name, value in given.items() if value is not None}
    if wrong := next((name for name in changes if name not in CHANGEABLE), None):
        raise RequestError(f"{wrong} cannot be changed in a run that has begun; only {', '.join(CHANGEABLE)} can")
    # another machine need not see the folder
    settings = folder.read_config()["settings"] if rank() == 0 or is_run(path) else {}
    with _processes(override(override(Config(), settings), changes)):
        return _continue(folder, data, changes, on_epoch, callbacks, started)


def _continue(
    folder: RunFiles,
    data: str | None,
    changes: Mapping[str, Any] | None = None,
    on_epoch: OnEpoch | None = None,
    callbacks: Sequence[Any] = (),
    started: float | None = None,
) -> dict[str, Any]:
    """Continue a run in processes that are connected; the first one reads the folder for all."""
    started = time.time() if started is None else started
    contents = on_first(folder.read_config)
    results, length = on_first(folder.read_results), {"epochs", "max_time"} & (changes or {}).keys()
    if results and not length:
        if rank() == 0:
            print(f"{folder.path} is finished already; add --epochs or --max-time to extend it")
        return summary(folder, results)
    before = override(Config(), contents["settings"])
    config = override(before, changes or {})
    on_first(lambda: check_loggers(config.logger))
    with _alone(folder) as lock:
        state = on_first(lambda: load_checkpoint(folder.checkpoints))
        if config != before:
            on_first(lambda: _check_changes(contents, config, state))
            _change(folder, contents, before, config, bool(length))
        build = (contents["build"]["name"], contents["build"]["arguments"])
        known = Preprocessing(**contents["preprocessing"]) if state else None
        spec = data or contents["data"]["spec"]
        job = everywhere(lambda: prepare(spec, config, build, known, recorded=data is None))
        _check_equal(job)
        if job.data.checksum != contents["data"]["checksum"]:
            raise RequestError(f"the data of {folder.path} have changed since it began: start a new run")
        run = Run(job, folder, contents, started, lock, on_epoch, callbacks=callbacks)
        run.restore(state, new_length=bool(length))
        return run.to_the_end()


def _check_changes(contents: Mapping[str, Any], config: Config, state: Mapping[str, Any] | None) -> None:
    """Raise RequestError if a run, given its settings file and checkpoint, cannot have these settings from now on."""
    done, per_epoch = (state["module"]["steps_done"] if state else 0), contents["schedule"]["steps_per_epoch"]
    if state and state.get("stage") and config.epochs != contents["settings"]["epochs"]:
        raise RequestError("the epochs with frozen layers are over: their number cannot be changed any more")
    if config.epochs and (config.epochs + config.unfreeze_epochs) * per_epoch < done:
        raise RequestError(f"{done / per_epoch:g} epochs are done already: set epochs to more than {config.epochs}")
    if config.max_time and state and parse_seconds(config.max_time) < state["seconds"] + LEAST_SECONDS:
        raise RequestError(
            f"the run took {state['seconds']:.0f} s already: set max_time to more than {config.max_time}"
        )


def _change(folder: RunFiles, contents: dict[str, Any], before: Config, config: Config, new_length: bool) -> None:
    """Write new settings into a run's folder and print them; a run with a new length is no longer finished."""
    contents["settings"] = to_dict(config)
    if new_length:
        seconds = parse_seconds(config.max_time) if config.max_time else None
        contents["schedule"] = schedule_of(config, contents["schedule"]["steps_per_epoch"], seconds)
    if rank() == 0:
        folder.write_config(contents)
        if new_length:
            folder.record.unlink(missing_ok=True)
        for name, (old, new) in difference(before, config).items():
            print(f"changed  {name}: {new} (was {old})")
        if new_length:
            print("changed  from now on the learning rate follows the schedule of a run of the new length")


def _check_equal(job: Job) -> None:
    """Raise RequestError if the processes would train on different data, or with different settings or versions."""
    facts = {"version": __version__, "data": job.data.checksum, "model": job.build, "precision": job.config.precision}
    settings = to_dict(job.config)
    check_equal(facts | {name: settings[name] for name in settings if name not in ("device", "workers", "logger")})


def _processes(config: Config) -> contextlib.AbstractContextManager[bool]:
    return process_group(choose_device(config.device), config.process_timeout)


@contextlib.contextmanager
def _alone(folder: RunFiles) -> Iterator[RunLock | None]:
    """Hold the run folder's lock in the first process. Other processes get None, or raise the first one's error."""
    lock = RunLock(folder.lock) if rank() == 0 else None

    def enter() -> None:
        assert lock is not None
        lock.__enter__()
        remove_leftovers(folder.path)

    on_first(enter)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.__exit__(None, None, None)
