"""Runs a study: makes its plan, fills its queue, trains its trials and runs, and writes the report."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

from convmixer import records
from convmixer.config import parse_seconds
from convmixer.data.argument import BUILT_IN, read_argument
from convmixer.errors import RequestError
from convmixer.run_folder import STUDY, StudyFolder
from convmixer.studies.plan import Plan, duration, identity, make_plan, probe_all
from convmixer.studies.queue import HEARTBEAT_SECONDS, Queue
from convmixer.studies.runner import Runner, read_plan
from convmixer.studies.schema import Study, list_studies, load_study
from convmixer.studies.trials import Trials


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
    against: Path | None = None,
) -> dict[str, Any]:
    """Train the missing runs of a study and write its report.

    Args:
        name: A shipped study, or the path of a study file.
        data: The data argument; None: the study's own.
        out: Study folder; None: `studies/<name>`.
        resume: Continue the study in that folder.
        budget: Start only runs that would end within this time, such as "2h"; None: the study's own, or no limit.
        dry_run: Measure the costs and print the plan; train nothing.
        worker: Take runs from a queue that another process started.
        storage: SQLAlchemy URL of the queue; None: SQLite in the study folder.
        heartbeat_seconds: Time between this worker's heartbeats.
        reuse: Folder of another study; runs that finished there with the same model, settings, seed and data are
            not trained again.
        against: Folder of another study with the same arms; the report compares the order of the arms.

    Returns:
        `report` and `records` (paths), `verdicts` (one mapping per claim), `missing` and `failed` (run names). For a
        dry run: `arms`, `seconds_total` and `runs`.

    Raises:
        RequestError: The study, the data or the folder cannot be used; nothing was trained.
    """
    began = time.monotonic()
    study = load_study(name)
    for other, what in ((reuse, "reuse"), (against, "compare with")):
        if other and not StudyFolder(other).plan.exists():
            raise RequestError(f"{other} holds no study to {what}: there is no {STUDY}")
    if data is None and name not in list_studies() and study.data not in BUILT_IN:
        _check_local(study.data)
    spec, out = data or study.data, out or Path("studies") / study.name
    if dry_run:
        return _dry_run(study, spec)
    _check_folder(out, study, resume or worker)
    limit = budget or study.budget
    allowed = parse_seconds(limit, "--budget") if limit else math.inf
    out.mkdir(parents=True, exist_ok=True)
    url = storage or f"sqlite:///{StudyFolder(out.resolve()).queue}"
    queue = Queue(url, identity(study), heartbeat_seconds)
    trials = Queue(url, f"{identity(study)}-trials", heartbeat_seconds) if study.tune else None
    starts = not worker and not queue.exists()
    if not (starts or worker or resume):
        raise RequestError("that queue holds the study already: continue it with --resume, or join it with --worker")
    if starts and StudyFolder(out).plan.exists():
        _rebuild_queue(queue, trials, out)
        starts = False
    elif starts:
        plan = make_plan(study, spec)
        _say_plan(plan)
        plan["probes"] = probe_all(plan, study)
        _start(queue, trials, plan)
    runner = Runner(study, spec, queue, out, began + allowed, reuse)
    if not starts:
        runner.check_data()
    if resume:
        queue.retry_failures()
    if trials:
        tuner = Trials(study, spec, trials, out, began + allowed)
        if resume:
            trials.retry_failures()
        tuner.work()
        runner.failures |= trials.failures()
        runner.chosen = tuner.choose()
    if not trials or runner.chosen:
        runner.work()
    return runner.report(against)


def _check_local(data: str) -> None:
    """Check that the data that a study file names are on this machine.

    A stranger may have written the study file, so it must not make the command use the network.
    """
    argument = read_argument(data)
    if argument.url or argument.repository:
        raise RequestError(f"the study file names data on the network: to use them, write the command with {data}")


def _start(queue: Queue, trials: Queue | None, plan: Plan, folder: StudyFolder | None = None) -> int:
    """Fill the queues of a study. The queue of trials is filled first, because workers start when runs are enqueued.

    Args:
        queue, trials: The queues of runs and of trials.
        plan: The plan.
        folder: The study folder, with records of runs and trials that have ended already; None: there are none.

    Returns:
        The number of these records.
    """
    kept = [_finished(folder.records), _finished(folder.trials)] if folder else [{}, {}]
    if trials:
        trials.start(plan["tune"]["runs"], plan, kept[1])
    queue.start(plan["runs"], plan, kept[0])
    return sum(map(len, kept))


def _finished(path: Path) -> dict[str, dict[str, Any]]:
    return {record.name: dataclasses.asdict(record) for record in (records.read(path) if path.exists() else ())}


def _rebuild_queue(queue: Queue, trials: Queue | None, out: Path) -> None:
    """Rebuild the queues from plan and records if the folder has no queue, for instance after a git clone."""
    kept = _start(queue, trials, read_plan(out), StudyFolder(out))
    print(f"study    its queue is missing in {out}: rebuilt from the plan and {kept} records")


def _dry_run(study: Study, spec: str) -> dict[str, Any]:
    plan = make_plan(study, spec)
    _say_plan(plan)
    probes = probe_all(plan, study)
    total = sum(probes[arm]["seconds"] for arm, _ in study.runs())
    runs = f"{len(plan['runs'])} runs"
    if tune := study.tune:
        share = tune.trials * (tune.epochs or study.recipe.epochs) / study.recipe.epochs
        total += share * sum(probes[arm]["seconds"] for arm in study.arms)
        runs = f"{len(plan['tune']['runs'])} trials and {runs}"
    print(f"{runs}, about {duration(total)} on this machine with one worker; nothing was trained")
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
    """Raise RequestError if a folder holds another study, or the same one without --resume."""
    if not StudyFolder(out).plan.exists():
        if out.exists() and any(out.iterdir()) and not goes_on:
            raise RequestError(f"{out} is not empty: choose another --out")
        return
    if not goes_on:
        raise RequestError(f"{out} holds a study already: continue it with --resume, or choose another --out")
    plan = read_plan(out)
    if plan["name"] != study.name:
        raise RequestError(f"{out} holds the study {plan['name']}: choose another --out")
    if plan["identity"] != identity(study):
        raise RequestError(f"the study {study.name} has changed since {out} was started: choose another --out")
