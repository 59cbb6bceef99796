"""The queue of a study's runs. Workers on one or several machines take runs from it. Optuna manages it.

Every run is enqueued before the first one starts; Optuna's samplers are not used. Each worker sends heartbeats. If
they stop, Optuna enqueues the worker's run again, and another worker continues it.
"""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

from convmixer.errors import RequestError
from convmixer.processes import is_dead, one_at_a_time, sign

HEARTBEAT_SECONDS = 15
GRACE_BEATS = 8  # missed heartbeats before a worker counts as dead; many, because a machine may pause briefly
RETRIES = 5

Record = dict[str, Any]
Train = Callable[[str], Record]


class Queue:
    """The runs of one study in a database.

    Args:
        url: SQLAlchemy URL of the database; missing tables are created.
        name: The study's name in the database.
        heartbeat_seconds: Time between a worker's heartbeats. If the study was started before, the time that was
            given then is used.

    Raises:
        RequestError: The database cannot be used.
    """

    def __init__(self, url: str, name: str, heartbeat_seconds: int = HEARTBEAT_SECONDS) -> None:
        self._storage = open_storage(url, heartbeat_seconds)
        self.name = name
        self._beat(self._attributes().get("heartbeat_seconds", heartbeat_seconds))

    def _beat(self, seconds: int) -> None:
        # other workers apply their own grace period to this worker, so all must have the same one
        self.heartbeat_seconds = self._storage.heartbeat_interval = seconds
        self._storage.grace_period = GRACE_BEATS * seconds

    def exists(self) -> bool:
        """Return whether `start` has finished for this study in this database."""
        return "plan" in self._attributes()

    def start(self, runs: list[str], plan: dict[str, Any], done: Mapping[str, Record] | None = None) -> None:
        """Enqueue all runs in order, and store the plan for the workers; an existing study is not changed.

        Args:
            runs: Names of all runs.
            plan: The plan of the study.
            done: Run name -> record of the runs that are finished already; they are stored but not enqueued.
        """
        if self.exists():
            return
        done = done or {}
        if self.name in optuna.get_all_study_names(self._storage):  # killed between the lines below
            optuna.delete_study(study_name=self.name, storage=self._storage)
        study = optuna.create_study(storage=self._storage, study_name=self.name, direction="maximize")
        for run in runs:
            if run in done:
                study.add_trial(_finished(run, runs, done[run]))
            else:
                study.enqueue_trial({"run": run})
        study.set_user_attr("runs", runs)
        study.set_user_attr("heartbeat_seconds", self.heartbeat_seconds)
        study.set_user_attr("plan", plan)  # last, so that a worker that finds the plan finds the whole queue

    def plan(self) -> dict[str, Any]:
        """Return the plan that `start` stored.

        Raises:
            RequestError: The study was not started in this database.
        """
        attributes = self._attributes()
        if "plan" not in attributes:
            raise RequestError(f"the study is not in the queue yet: start it without --worker first ({self.name})")
        return dict(attributes["plan"])

    def records(self) -> dict[str, Record]:
        """Return the record of every finished run."""
        done = self._study().get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return {trial.params["run"]: trial.user_attrs["record"] for trial in done}

    def failures(self) -> dict[str, str]:
        """Return run -> error of the runs that failed and are neither finished nor queued again."""
        trials = [(_run_of(t), t) for t in self._study().get_trials(deepcopy=False)]
        going_on = {run for run, t in trials if t.state != TrialState.FAIL}
        failed = [(run, t) for run, t in trials if t.state == TrialState.FAIL and run and run not in going_on]
        return {run: t.user_attrs.get("error", "its workers died") for run, t in failed}

    def waiting(self) -> list[str]:
        """Return the runs that no worker has taken, the next one first."""
        return self._runs(TrialState.WAITING)

    def running(self) -> list[str]:
        """Return the runs that workers are training, or were training when they died."""
        return self._runs(TrialState.RUNNING)

    def retry_failures(self) -> None:
        """Enqueue failed runs again."""
        for run in self.failures():
            self._study().enqueue_trial({"run": run})

    def recover(self) -> None:
        """Enqueue the runs of dead workers again: at once if they died on this machine, else when heartbeats stop."""
        with _one_at_a_time(self.name):
            for trial in self._study().get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if is_dead(trial.user_attrs.get("worker")):
                    self._put_back(trial._trial_id)
        optuna.storages.fail_stale_trials(self._study())

    def take(self, train: Train) -> str | None:
        """Take the next run, train it, and store its record.

        Args:
            train: Run name -> record with the key "results". If it raises, the error is stored as the run's failure.
                After SystemExit or KeyboardInterrupt, the run is the first in the queue again.

        Returns:
            The run's name, or None if no run was waiting.
        """
        taken: list[str] = []
        ids: list[int] = []
        taking = contextlib.ExitStack()

        def objective(trial: optuna.Trial) -> float:
            taking.close()
            run = _run_of(self._storage.get_trial(trial._trial_id))
            if run is None:  # another worker has just taken the last run
                raise optuna.TrialPruned
            ids.append(trial._trial_id)
            taken.append(trial.suggest_categorical("run", self._study().user_attrs["runs"]))
            trial.set_user_attr("worker", sign())
            return self._train(trial, run, train)

        if self.waiting():
            try:
                with taking:  # in SQLite, Optuna gives the same run to two workers that ask at the same moment
                    taking.enter_context(_one_at_a_time(self.name))
                    self._study().optimize(objective, n_trials=1, catch=(Exception,))
            except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
                if not (ids and self._storage.get_trial(ids[0]).state.is_finished()):
                    raise
                print(
                    f"{taken[0]} is not recorded: no heartbeat was sent for too long, so another worker took it over"
                )
        return taken[0] if taken else None

    def _train(self, trial: optuna.Trial, run: str, train: Train) -> float:
        try:
            record = self.records().get(run) or train(run)  # a run that counted as dead may have finished after all
        except (SystemExit, KeyboardInterrupt) as stop:
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # another worker has recorded it
                self._put_back(trial._trial_id)
            raise SystemExit(130 if isinstance(stop, KeyboardInterrupt) else stop.code) from None
        except Exception as error:
            self._take_back(trial._trial_id)
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            raise
        self._take_back(trial._trial_id)
        trial.set_user_attr("record", record)
        return _value(record)

    def _put_back(self, trial_id: int) -> None:
        # remove this worker's process number, or the next worker would look dead until it has written its own
        self._storage.set_trial_user_attr(trial_id, "worker", None)
        self._storage.set_trial_state_values(trial_id, TrialState.WAITING)

    def _take_back(self, trial_id: int) -> None:
        """Take back a run that was enqueued again although this worker is alive, unless another worker trains it."""
        if self._storage.get_trial(trial_id).state == TrialState.WAITING:
            self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)

    def _attributes(self) -> dict[str, Any]:
        if self.name not in optuna.get_all_study_names(self._storage):
            return {}
        return dict(self._study().user_attrs)

    def _runs(self, state: TrialState) -> list[str]:
        trials = self._study().get_trials(deepcopy=False, states=(state,))
        return [run for trial in trials if (run := _run_of(trial))]

    def _study(self) -> optuna.Study:
        return optuna.load_study(study_name=self.name, storage=self._storage)


def open_storage(url: str, heartbeat_seconds: int) -> RDBStorage:
    """Return an Optuna database that enqueues the trials of workers without a heartbeat again.

    Args:
        url: SQLAlchemy URL; missing tables are created.
        heartbeat_seconds: Time between a worker's heartbeats.

    Raises:
        RequestError: The database cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # marked experimental for years; if a later Optuna changes them, our tests fail
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    if url.startswith(("postgres://", "postgresql://")):  # SQLAlchemy 2.0 and 2.1 choose different drivers
        url = "postgresql+psycopg2://" + url.partition("://")[2]
    # SQLite allows one writer at a time: wait for it instead of failing
    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        return RDBStorage(
            url,
            engine,
            heartbeat_interval=heartbeat_seconds,
            grace_period=GRACE_BEATS * heartbeat_seconds,
            heartbeat_stale_trial_callback=_enqueue_again,
        )
    except ImportError as error:
        raise RequestError(f"{url.split(':')[0]} needs its driver: pip install 'convmixer[postgres]'") from error
    except Exception as error:  # SQLAlchemy and the drivers raise many types for a wrong address
        reason = str(error).strip().splitlines()[0]
        raise RequestError(f"cannot use the storage {_without_password(url)}: {reason}") from error


def _value(record: Record) -> float:
    """Return the value that Optuna needs for each trial; it is not used."""
    return float(record["results"]["test_top1"] or 0.0)


def _finished(run: str, runs: list[str], record: Record) -> optuna.trial.FrozenTrial:
    """Return an Optuna trial for a run that ended elsewhere."""
    return optuna.trial.create_trial(
        value=_value(record),
        params={"run": run},
        distributions={"run": optuna.distributions.CategoricalDistribution(runs)},
        user_attrs={"record": record},
    )


def _enqueue_again(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Enqueue the run of a worker whose heartbeat has stopped, without that worker's process number."""
    trial.user_attrs.pop("worker", None)
    RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)(study, trial)


def _one_at_a_time(name: str) -> contextlib.AbstractContextManager[None]:
    """Make the workers of a study on this machine take runs, and look for dead workers, one at a time."""
    return one_at_a_time(Path(tempfile.gettempdir()) / f"convmixer-{os.getuid()}-{name}.lock")


def _run_of(trial: optuna.trial.FrozenTrial) -> str | None:
    return trial.params.get("run") or trial.system_attrs.get("fixed_params", {}).get("run")


def _without_password(url: str) -> str:
    from sqlalchemy.engine import make_url

    try:
        return make_url(url).render_as_string(hide_password=True)
    except Exception:
        return "URL"
