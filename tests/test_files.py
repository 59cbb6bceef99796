"""Atomic files: whole or not at all, no temporary files left, and errors that name the target."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convmixer import files


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    files.write_atomic(path, b"old")
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_the_file_before_is_kept_under_another_name(tmp_path: Path) -> None:
    for text in (b"1", b"2", b"3"):
        with files.atomic_file(tmp_path / "latest", keep=tmp_path / "previous") as file:
            file.write(text)
    assert [(tmp_path / name).read_bytes() for name in ("previous", "latest")] == [b"2", b"3"]


def test_a_block_that_raises_changes_nothing(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "a", b"old")

    def fail() -> None:
        with files.atomic_file(tmp_path / "a", keep=tmp_path / "b") as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "a", b"old")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="a'") as caught:
            files.write_atomic(tmp_path / "a", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert caught.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    host = socket.gethostname()
    dead = tmp_path / "deep" / f".a.{host}.{int(done.stdout)}.tmp"
    alive = tmp_path / f".a.{host}.{os.getpid()}.tmp"
    others = [tmp_path / f".a.elsewhere.{int(done.stdout)}.tmp", tmp_path / "mine.tmp", tmp_path / ".mine.tmp"]
    dead.parent.mkdir()
    for path in (dead, alive, *others):
        path.touch()
    files.remove_leftovers(tmp_path)
    assert not dead.exists()
    assert all(path.exists() for path in (alive, *others))


def test_the_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder("kernels") == tmp_path / "convmixer" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "convmixer"


def test_the_files_used_last_stay_and_those_of_this_week_too(tmp_path: Path) -> None:
    now = time.time()
    for day in range(6):
        path = tmp_path / str(day)
        path.write_bytes(bytes(100))
        os.utime(path, (now, now - day * 86400))
    files.prune([*tmp_path.iterdir(), tmp_path / "gone"], 150, unused_seconds=2.5 * 86400)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]
    files.prune(tmp_path.iterdir(), 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
