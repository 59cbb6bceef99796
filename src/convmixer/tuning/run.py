"""Hyperparameter search: trials train on the data and are scored only on the validation split.

Optuna proposes the values, stops trials that are worse than others, and stores the search in a database. Therefore a
search can be stopped, continued and shared by several workers. The test split is never read.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from convmixer import records
from convmixer.config import Config, difference, override, parse_seconds, to_dict
from convmixer.errors import Failed, RequestError
from convmixer.files import write_atomic
from convmixer.processes import is_dead, sign
from convmixer.results.runs import read_metrics
from convmixer.run_folder import SEARCH, STUDY_QUEUE, RunFolder, is_run
from convmixer.studies.queue import HEARTBEAT_SECONDS, open_storage
from convmixer.studies.space import Space, suggest, values_of
from convmixer.train.run import resume, train
from convmixer.tuning.space import load_space

RECIPE, TABLE = "recipe.yaml", "trials.csv"
VAL_FRACTION = 0.1  # share of train held out if neither the recipe nor the data give a validation split
STARTUP_TRIALS = 5  # trials with random values, from which the sampler then learns


def tune(
    data: str,
    recipe: Config,
    recipe_name: str,
    out: Path | None = None,
    *,
    space: Path | None = None,
    trials: int | None = None,
    budget: str | None = None,
    resumes: bool = False,
    worker: bool = False,
    storage: str | None = None,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> dict[str, Any]:
    """Search hyperparameters of a recipe on a data set and write the best as a recipe file.

    Args:
        data: The data argument.
        recipe: The settings; those that are not in the space stay as they are.
        recipe_name: Name of the recipe.
        out: Folder for trials, tables and pictures; None: `tune/<recipe>`.
        space: YAML file of the settings to search; None: the shipped `space.yaml`.
        trials: Number of trials, of all workers together, after which the search ends. None: no limit if there is a
            budget, else 20.
        budget: Start only trials that would end within this time, such as "2h".
        resumes: Continue the search in `out`.
        worker: Help with a search that was started elsewhere.
        storage: SQLAlchemy URL of the database; None: SQLite in the folder.
        heartbeat_seconds: Time between this worker's heartbeats.

    Returns:
        `best` (setting -> value), `val_top1` (percent), `trials`, `pruned`, `failed` (counts), `recipe` (path).

    Raises:
        RequestError: The settings, the data or the folder cannot be used.
        RuntimeError: No trial ended.
    """
    if trials is not None and trials < 1:
        raise RequestError(f"--trials must be at least 1, not {trials}")
    out = out or Path("tune") / recipe_name
    search = Search(data, _base(recipe), recipe_name, load_space(space), out)
    search.open(storage, heartbeat_seconds, joins=resumes or worker)
    limit = parse_seconds(budget, "--budget") if budget else math.inf
    search.work(time.monotonic() + limit, trials or (20 if budget is None else None))
    return search.report()


def _base(recipe: Config) -> Config:
    """Return the recipe with a validation split, without pictures, and without reading the test split."""
    return dataclasses.replace(recipe, test=False, draw=False, val_fraction=recipe.val_fraction or VAL_FRACTION)


class Search:
    """One worker of a search.

    Args:
        data: The data argument.
        base: Settings that are not searched.
        recipe_name: Name of these settings.
        space: Settings that are searched.
        out: The folder.
    """

    def __init__(self, data: str, base: Config, recipe_name: str, space: Space, out: Path) -> None:
        self.data, self.base, self.recipe_name, self.space, self.out = data, base, recipe_name, space, out
        self.plan = {"data": data, "recipe": difference(Config(), base), "space": space}
        digest = hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest()
        self.name = f"tune-{recipe_name}-{digest[:10]}"

    def open(self, storage: str | None, heartbeat_seconds: int, joins: bool) -> None:
        """Open or start the search.

        Raises:
            RequestError: The folder holds something else, or another search.
        """
        known = self.out / SEARCH
        if known.exists() and not joins:
            raise RequestError(
                f"{self.out} holds a search already: continue it with --resume, or choose another --out"
            )
        if known.exists() and json.loads(known.read_text(encoding="utf-8"))["name"] != self.name:
            raise RequestError(
                f"the search in {self.out} has other data, settings or another space: choose another --out"
            )
        if not known.exists() and self.out.exists() and any(self.out.iterdir()):
            raise RequestError(f"{self.out} is not empty: choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        store = open_storage(storage or f"sqlite:///{self.out.resolve()}/{STUDY_QUEUE}", heartbeat_seconds)
        seed = int.from_bytes(hashlib.sha256(f"{self.base.seed} {sign()}".encode()).digest()[:4], "little")
        found = self.name in optuna.get_all_study_names(store)
        first = self.base.seed if not found else seed  # workers with the same seed would propose the same values
        self.study = optuna.create_study(
            storage=store,
            study_name=self.name,
            direction="maximize",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(
                n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True, seed=first
            ),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=1),
        )
        write_atomic(known, json.dumps(self.plan | {"name": self.name}, indent=1).encode())

    def work(self, deadline: float, trials: int | None) -> None:
        """Run trials until enough have ended or the next one would not fit into the time."""
        self.recover()
        while trials is None or self._count() < trials:
            left = deadline - time.monotonic()
            if left <= 0 or self._estimate() > left:
                print(f"budget   the next trial would take about {self._estimate():.0f} s: not started")
                return
            self.study.optimize(self._trial, n_trials=1, catch=(RuntimeError, ArithmeticError, OSError))
            self._say(self.study.get_trials(deepcopy=False)[-1])

    def recover(self) -> None:
        """Enqueue the trials of workers that died on this machine again."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if is_dead(trial.user_attrs.get("worker")):
                self.study.tell(trial.number, state=TrialState.FAIL)
                self.study.enqueue_trial(trial.params, user_attrs={"folder": trial.user_attrs.get("folder")})

    def report(self) -> dict[str, Any]:
        """Write the best settings, a table and pictures; print and return the result of the search.

        Raises:
            RuntimeError: No trial ended.
        """
        done = self.study.get_trials(deepcopy=False)
        counts = {state: sum(trial.state == state for trial in done) for state in TrialState}
        if not counts[TrialState.COMPLETE]:
            raise Failed(f"not one of {len(done)} trials ended: see {self.out}")
        best = self.study.best_trial
        values = values_of(best.params, self.space)
        config = dataclasses.replace(override(self.base, values), test=True, draw=True)
        write_atomic(self.out / RECIPE, self._recipe_file(config, best).encode())
        write_atomic(self.out / TABLE, _table(done, self.space).encode())
        self._draw({trial.value for trial in done if trial.state == TrialState.COMPLETE})
        print(f"best     trial {best.number}: val top-1 {best.value:.2f}%: {_words(values)}")
        print(f"recipe   {self.out / RECIPE}: convmixer train {self.data} --config {self.out / RECIPE}")
        return {
            "best": values,
            "val_top1": best.value,
            "trials": counts[TrialState.COMPLETE],
            "pruned": counts[TrialState.PRUNED],
            "failed_trials": counts[TrialState.FAIL],
            "recipe": str(self.out / RECIPE),
        }

    # One trial

    def _trial(self, trial: optuna.Trial) -> float:
        config = override(self.base, suggest(trial, self.space))
        folder = trial.user_attrs.get("folder") or f"trials/{trial.number:04d}"
        trial.set_user_attr("folder", folder)
        trial.set_user_attr("worker", sign())
        began = time.monotonic()

        def on_epoch(row: dict[str, Any]) -> None:
            trial.report(row["top1"], round(row["epoch"]))
            if trial.should_prune():
                raise optuna.TrialPruned

        run = RunFolder(self.out / folder)
        try:
            if is_run(run.path):
                for row in read_metrics(run):
                    trial.report(row["top1"], round(row["epoch"]))
                result = resume(run.path, self.data, on_epoch=on_epoch)
            else:
                shutil.rmtree(run.path, ignore_errors=True)  # killed before its first file
                result = train(self.data, config, run.path, self.base, self.recipe_name, on_epoch=on_epoch)
        except optuna.TrialPruned:
            shutil.rmtree(run.checkpoints, ignore_errors=True)
            raise
        shutil.rmtree(run.checkpoints, ignore_errors=True)  # only checkpoints are deleted, not the weights
        trial.set_user_attr("seconds", time.monotonic() - began)
        if result["val_top1"] is None:
            raise RequestError(f"{self.data} has no validation split to choose on")
        return float(result["val_top1"])

    def _count(self) -> int:
        going = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        return len(self.study.get_trials(deepcopy=False, states=going))

    def _estimate(self) -> float:
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        seconds = [trial.user_attrs["seconds"] for trial in done if "seconds" in trial.user_attrs]
        return statistics.median(seconds) if seconds else 0.0

    def _say(self, trial: FrozenTrial) -> None:
        how = f"val top-1 {trial.value:.2f}%" if trial.state == TrialState.COMPLETE else trial.state.name.lower()
        print(f"trial    {trial.number}: {how}: {_words(values_of(trial.params, self.space))}\n", flush=True)

    # Files

    def _recipe_file(self, config: Config, best: FrozenTrial) -> str:
        import yaml

        settings = to_dict(config) | {"val_fraction": self.base.val_fraction}
        head = f"# Found by {records.command_line()}\n# Trial {best.number}: val top-1 {best.value:.2f}%\n"
        return head + str(yaml.safe_dump(settings, sort_keys=False))

    def _draw(self, found: set[float | None]) -> None:
        """Draw the history of the search and, if the accuracies of trials differ, the importance of each setting."""
        import warnings

        import matplotlib

        from convmixer.results.plots import save

        draw, history, importance = (
            optuna.visualization.matplotlib,
            self.out / "history.png",
            self.out / "importance.png",
        )
        with warnings.catch_warnings(), matplotlib.rc_context():  # Optuna sets a style for the whole process
            warnings.simplefilter("ignore")  # warnings about experimental interfaces and too few trials
            save(_figure(draw.plot_optimization_history(self.study, target_name="val top-1 (%)")), history)
            if len(found) > 1 and len(self.space) > 1:
                save(_figure(draw.plot_param_importances(self.study, target_name="val top-1")), importance)


def _figure(axes: Any) -> Any:
    """Return the figure of Optuna's axes, laid out."""
    axes.figure.set_layout_engine("constrained")
    return axes.figure


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def _table(trials: list[FrozenTrial], space: Space) -> str:
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", "val_top1", "seconds", *space])
    for trial in trials:
        values = values_of(trial.params, space)
        seconds = trial.user_attrs.get("seconds")
        value = trial.value if trial.state == TrialState.COMPLETE else None
        writer.writerow(
            [trial.number, trial.state.name.lower(), value, seconds, *(values.get(name) for name in space)]
        )
    return text.getvalue()
