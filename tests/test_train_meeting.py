"""Processes that torchrun starts, or starts again, meet in one store: by name, in bounded time."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from convmixer.errors import PeerLost, RequestError
from convmixer.train import meeting
from convmixer.train.meeting import Meeting


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """What torchrun keeps through all restarts."""
    found = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.port), "RANK": "0", "WORLD_SIZE": "3"}
    for name, value in (variables | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "BEAT_SECONDS", 0.05)
    return found


def together(work: Callable[[int], Any], ranks: range = range(3)) -> list[Future[Any]]:
    """Do something as several processes would, here in threads, and return how each ended."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [pool.submit(work, rank) for rank in ranks]


def meet(seconds: float = 10) -> list[Meeting]:
    return [end.result() for end in together(lambda rank: Meeting(rank, 3, seconds))]


def test_each_attempt_has_a_name_and_knows_whether_it_is_the_first() -> None:
    first, second = meet(), meet()
    assert len({found.name for found in first}) == len({found.name for found in second}) == 1
    assert first[0].name != second[0].name
    assert [found.restarted for found in (*first, *second)] == [False] * 3 + [True] * 3
    first[0].store.set("address", "of the dead")
    assert not second[0].store.check(["address"])


def test_a_process_that_comes_first_waits_for_the_new_attempt() -> None:
    """What an earlier attempt wrote, even its permission to begin, is not for this one."""
    old = meet()[0].name

    def late_leader(rank: int) -> str:
        time.sleep(0.3 if rank == 0 else 0)
        return Meeting(rank, 3, 10).name

    names = {end.result() for end in together(late_leader)}
    assert len(names) == 1
    assert old not in names


@pytest.mark.parametrize("missing", [0, 2])
def test_one_that_does_not_join_is_named_in_time(missing: int) -> None:
    began = time.monotonic()
    here = [rank for rank in range(3) if rank != missing]
    ends = together(lambda i: Meeting(here[i], 3, 1), range(2))
    expected = "the first of 3 processes did not join within 1 s" if missing == 0 else r"process 2 of 3 did not join"
    for end in ends if missing == 0 else ends[:1]:
        with pytest.raises(PeerLost, match=expected):
            end.result()
    assert all(isinstance(end.exception(), PeerLost) for end in ends)
    assert time.monotonic() - began < 5


def test_a_slow_process_is_waited_for_as_long_as_it_lives() -> None:
    found = meet(seconds=0.3)

    def work(rank: int) -> int:
        return found[rank].everywhere(lambda: time.sleep(0.7 if rank == 1 else 0) or rank)

    assert [end.result() for end in together(work)] == [0, 1, 2]
    assert [end.result() for end in together(work)] == [0, 1, 2]


def test_what_one_refuses_all_refuse() -> None:
    found = meet()

    def refuse() -> None:
        raise RequestError("no data here")

    ends = together(lambda rank: found[rank].everywhere(refuse if rank == 2 else lambda: None))
    assert [str(end.exception()).startswith("no data here") for end in ends] == [True] * 3
    assert "process 2 on " in str(ends[0].exception())


def test_a_silent_process_is_named() -> None:
    found = meet(seconds=0.5)
    gone = threading.Event()

    def work(rank: int) -> None:
        if rank == 2:
            gone.wait(1.2)
        else:
            found[rank].everywhere(lambda: None)

    ends = together(work)
    for end in ends[:2]:
        with pytest.raises(PeerLost, match=r"process 2 of 3 sent no heartbeat within 0\.5 s"):
            end.result()
