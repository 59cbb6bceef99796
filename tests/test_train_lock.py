"""One process at a time trains in a run folder; locks of dead processes do not block, those of living ones do."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from convmixer.errors import RequestError
from convmixer.processes import sign
from convmixer.train import lock
from convmixer.train.lock import RunLock

HOLD = "import sys, time; from pathlib import Path; from convmixer.train.lock import RunLock\n"
HOLD += "with RunLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "DEAD_AFTER_SECONDS", 0.5)


def hold_elsewhere(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_process_is_refused_in_one_line(path: Path) -> None:
    holder = hold_elsewhere(path)
    try:
        with pytest.raises(RequestError, match=f"is in use by process {holder.pid} on "), RunLock(path):
            pass
    finally:
        holder.kill()
        holder.communicate()


def test_a_killed_holder_does_not_block(path: Path) -> None:
    holder = hold_elsewhere(path)
    holder.kill()  # not yet waited for: a zombie is dead
    for _ in range(100):
        try:
            with RunLock(path):
                break
        except RequestError:  # the kill has not arrived
            time.sleep(0.05)
    else:
        pytest.fail("blocked by a dead process")
    holder.communicate()
    assert not path.exists()
    assert not list(path.parent.iterdir())


def test_a_process_number_that_was_given_away_again_does_not_block(path: Path) -> None:
    path.write_text(json.dumps(sign() | {"started": "1"}))
    with RunLock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_silent_holder_on_another_machine_does_not_block(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    started = time.monotonic()
    with RunLock(path):
        assert time.monotonic() - started > 0.4
    assert "waiting 0 s to see whether process 1 on elsewhere is alive" in capsys.readouterr().out


def test_a_holder_on_another_machine_that_gives_a_sign_blocks(path: Path) -> None:
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(RequestError, match="process 1 on elsewhere"), RunLock(path):
            pass
    finally:
        done.set()
        thread.join()


def test_a_damaged_lock_does_not_block_for_ever(path: Path) -> None:
    for content in (b"", b"\xff\xfe", b"[1]", b'{"pid": "x"}'):
        path.write_bytes(content)
        with RunLock(path):
            pass
        assert not path.exists()


def test_a_holder_that_lost_its_lock_notices_and_leaves_the_new_one_alone(path: Path) -> None:
    with RunLock(path) as held:
        held.check()
        path.write_text("another process")
        for _ in range(100):
            if held.lost:
                break
            time.sleep(0.02)
        with pytest.raises(RuntimeError, match="another process took over"):
            held.check()
    assert path.read_text() == "another process"


def test_of_many_that_find_a_dead_lock_one_gets_it(path: Path) -> None:
    holder = hold_elsewhere(path)
    holder.kill()
    holder.communicate()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and sum(process.poll() is None for process in started) > 1:
        time.sleep(0.05)
    alive = [process for process in started if process.poll() is None]
    assert len(alive) == 1
    assert json.loads(path.read_text())["pid"] == alive[0].pid
    for process in started:
        process.kill()
        process.communicate()
