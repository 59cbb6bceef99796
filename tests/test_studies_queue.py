"""The queue: order, records, failures, interruption, dead workers on this machine and elsewhere."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

import commands
from convmixer.errors import RequestError
from convmixer.studies.queue import Queue

RUNS = ["a/seed0", "b/seed0", "a/seed1"]


def record(run: str) -> dict[str, Any]:
    return {"results": {"test_top1": 50.0}, "name": run}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/queue.db"


def started(url: str, heartbeat_seconds: int = 15) -> Queue:
    queue = Queue(url, "test", heartbeat_seconds)
    queue.start(RUNS, {"k": 1})
    return queue


def test_runs_are_taken_in_order_and_recorded(url: str) -> None:
    queue = started(url)
    assert [queue.take(record), Queue(url, "test").take(record)] == RUNS[:2]
    assert queue.waiting() == RUNS[2:]
    queue.start(["other"], {})  # exists already
    assert queue.take(record) == RUNS[2]
    assert queue.take(record) is None
    assert queue.records() == {run: record(run) for run in RUNS}
    assert queue.plan() == {"k": 1}


def test_a_failure_is_kept_and_the_rest_goes_on(url: str) -> None:
    def train(run: str) -> dict[str, Any]:
        if run == "a/seed0":
            raise FloatingPointError("loss is nan")
        return record(run)

    queue = started(url)
    while queue.take(train):
        pass
    assert queue.failures() == {"a/seed0": "FloatingPointError: loss is nan"}
    assert list(queue.records()) == RUNS[1:]
    queue.retry_failures()
    assert queue.take(record) == "a/seed0"
    assert not queue.failures()
    assert sorted(queue.records()) == sorted(RUNS)


@pytest.mark.parametrize(("error", "code"), [(SystemExit(143), 143), (KeyboardInterrupt(), 130)])
def test_an_interrupted_run_is_the_next(url: str, error: BaseException, code: int) -> None:
    def train(run: str) -> dict[str, Any]:
        raise error

    queue = started(url)
    with pytest.raises(SystemExit) as caught:
        queue.take(train)
    assert caught.value.code == code
    assert queue.waiting() == RUNS
    assert queue.take(record) == RUNS[0]


def test_a_worker_needs_a_started_study(url: str) -> None:
    with pytest.raises(RequestError, match="start it without --worker first"):
        Queue(url, "test").plan()


@pytest.mark.parametrize(
    "url", ["postgresql://user:secret@127.0.0.1:1/none", "nonsense", "sqlite:////no/such/folder/queue.db"]
)
def test_a_wrong_address_is_one_clear_error_without_the_password(url: str) -> None:
    with pytest.raises(RequestError, match=r"cannot use the storage|needs its driver") as caught:
        Queue(url, "test")
    assert "secret" not in str(caught.value)


def test_a_start_that_was_killed_is_done_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = optuna.Study.set_user_attr

    def killed(study: optuna.Study, key: str, value: Any) -> None:
        if key == "plan":
            raise KeyboardInterrupt
        keep(study, key, value)

    monkeypatch.setattr(optuna.Study, "set_user_attr", killed)
    with pytest.raises(KeyboardInterrupt):
        started(url)
    monkeypatch.undo()
    assert not Queue(url, "test").exists()
    assert started(url).waiting() == RUNS


def test_a_worker_that_was_given_up_drops_its_result_and_goes_on(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = started(url)

    def train(run: str) -> dict[str, Any]:
        trial = queue._study().get_trials(deepcopy=False)[0]
        queue._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)  # as its heartbeat's end does
        return record(run)

    assert queue.take(train) == RUNS[0]
    assert "another worker took it over" in capsys.readouterr().out
    assert queue.records() == {}
    assert queue.take(record) == RUNS[1]


def test_all_workers_have_the_heartbeat_of_the_start(url: str) -> None:
    started(url, 7)
    assert Queue(url, "test", 300).heartbeat_seconds == 7


def _hang(url: str, taken: Any) -> None:
    def train(run: str) -> dict[str, Any]:
        taken.put(run)
        time.sleep(60)
        return record(run)

    Queue(url, "test", 1).take(train)


def _take_all(url: str, ready: Any, trained: Any) -> None:
    def train(run: str) -> dict[str, Any]:
        trained.put(run)
        return record(run)

    queue = Queue(url, "test")
    ready.wait()
    while queue.waiting():
        queue.take(train)


def test_workers_that_take_at_the_same_moment_take_different_runs(url: str) -> None:
    runs = [f"arm-seed{seed}" for seed in range(24)]
    Queue(url, "test").start(runs, {"k": 1})
    context = commands.context()
    ready, trained = context.Barrier(6), context.Queue()
    workers = [context.Process(target=_take_all, args=(url, ready, trained)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert sorted(trained.get(timeout=5) for _ in range(trained.qsize())) == sorted(runs)
    assert sorted(Queue(url, "test").records()) == sorted(runs)


def _killed_worker(url: str) -> None:
    context = commands.context()
    taken = context.Queue()
    worker = context.Process(target=_hang, args=(url, taken))
    worker.start()
    assert taken.get(timeout=60) == RUNS[0]
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join()


def test_a_worker_killed_on_this_machine_is_noticed_at_once(url: str) -> None:
    queue = started(url, 15)
    _killed_worker(url)
    assert queue.running() == RUNS[:1]
    queue.recover()
    assert queue.running() == []
    assert queue.waiting() == RUNS
    # the next worker's run does not look like a dead one's before it has signed
    assert queue._study().get_trials(deepcopy=False)[0].user_attrs["worker"] is None


def test_a_worker_in_another_container_is_not_robbed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = started(url, 15)
    _killed_worker(url)  # alive, but in another PID namespace, so that its number is nobody's here
    readlink = os.readlink
    other = "pid:[1]"
    monkeypatch.setattr(os, "readlink", lambda path: other if path == "/proc/self/ns/pid" else readlink(path))
    queue.recover()
    assert queue.running() == RUNS[:1]


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no /proc on this system")
def test_a_number_that_another_process_has_got_since_is_no_sign_of_life(url: str) -> None:
    queue = started(url, 15)
    _killed_worker(url)
    trial = queue._study().get_trials(deepcopy=False)[0]
    queue._storage.set_trial_user_attr(trial._trial_id, "pid", os.getpid())
    queue.recover()
    assert queue.waiting() == RUNS


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_was_put_back_while_its_worker_lived_is_kept(url: str, fails: bool) -> None:
    queue = started(url)

    def train(run: str) -> dict[str, Any]:
        queue._put_back(queue._study().get_trials(deepcopy=False)[0]._trial_id)
        if fails:
            raise RuntimeError("no")
        return record(run)

    assert queue.take(train) == RUNS[0]
    assert queue.records() == ({} if fails else {RUNS[0]: record(RUNS[0])})
    assert queue.waiting() == RUNS[1:]


def test_a_worker_killed_elsewhere_is_noticed_by_its_heartbeat(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = started(url, 1)
    _killed_worker(url)
    monkeypatch.setattr("socket.gethostname", lambda: "another-machine")
    queue.recover()
    assert queue.running() == RUNS[:1]  # silent, but not yet for long
    monkeypatch.setattr("convmixer.studies.queue.GRACE_BEATS", 2)
    late = Queue(url, "test", 1)
    deadline = time.monotonic() + 30
    while late.running() and time.monotonic() < deadline:
        time.sleep(0.5)
        late.recover()
    assert late.running() == []
    assert sorted(late.waiting()) == sorted(RUNS)
    while late.take(record):
        pass
    assert sorted(late.records()) == sorted(RUNS)
