"""Lets the processes of a run find each other, and notice if another one is gone.

The processes communicate through torchrun's store. If torchrun restarts them, a new attempt begins, but the store
still holds what earlier attempts wrote. Therefore the first process gives each attempt a unique name, and training
starts with exactly the processes that confirmed this name.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from convmixer.errors import PeerLost, RequestError

POLL_SECONDS = 0.05
BEAT_SECONDS = 2.0
_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR of Linux

T = TypeVar("T")


def under_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class Meeting:
    """The processes of one attempt.

    Args:
        rank, world: Index of this process, and the number of processes.
        seconds: How long to wait for a heartbeat of another process.

    Attributes:
        store: Where the processes exchange addresses. It does not show what earlier attempts wrote.
        restarted: Whether torchrun restarted any of these processes.

    Raises:
        PeerLost: A process did not join in time.
    """

    def __init__(self, rank: int, world: int, seconds: float) -> None:
        self.rank, self.world, self.seconds = rank, world, seconds
        if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
            _choose_interface(os.environ["MASTER_ADDR"])
        every, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
        self._every = dist.PrefixStore("convmixer", every)
        self._own = secrets.token_hex(8)
        self.name, self.restarted = self._lead() if rank == 0 else self._follow()
        self.store: dist.Store = dist.PrefixStore(self.name, every)
        self._works = 0

    # Meeting

    def _lead(self) -> tuple[str, bool]:
        """Name this attempt, and publish which processes have joined it."""
        again, name = self._every.check(["attempt"]), secrets.token_hex(8)
        self._every.set("attempt", name)
        self._answer(name)
        self._wait_for(lambda rank: self._every.check([f"{name}/{rank}"]), "did not join")
        answers = [json.loads(self._every.get(f"{name}/{rank}")) for rank in range(self.world)]
        restarted = again or any(restarted for _, restarted in answers)
        self._every.set(f"{name}/begin", json.dumps([[own for own, _ in answers], restarted]))
        return name, restarted

    def _follow(self) -> tuple[str, bool]:
        """Confirm the name of the newest attempt, until an attempt includes this process."""
        deadline, answered = time.monotonic() + self.seconds, ""
        while time.monotonic() < deadline:
            name = self._every.get("attempt").decode() if self._every.check(["attempt"]) else ""
            if name and name != answered:
                self._answer(name)
                answered = name
            if name and self._every.check([f"{name}/begin"]):
                there, restarted = json.loads(self._every.get(f"{name}/begin"))
                if self.rank < len(there) and there[self.rank] == self._own:
                    return name, restarted
            time.sleep(POLL_SECONDS)
        raise PeerLost(f"the first of {self.world} processes did not join within {self.seconds:g} s")

    def _answer(self, name: str) -> None:
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        self._every.set(f"{name}/{self.rank}", json.dumps([self._own, restarted]))

    # Work whose duration differs between processes

    def everywhere(self, work: Callable[[], T]) -> T:
        """Do work in all processes, and return when all have done it. If one raises RequestError, all raise it.

        The work may take long in one process, for instance to fetch data: the others wait as long as it sends
        heartbeats.

        Raises:
            PeerLost: A process no longer sends heartbeats.
        """
        self._works += 1
        with self._beating():
            try:
                done = work()
            except RequestError as error:
                self.store.set("refused", f"{error} (process {self.rank} on {socket.gethostname()})")
                raise
            self.store.set(f"{self._works}/{self.rank}", "done")
            self._wait_for(self._is_done, "sent no heartbeat")
        return done

    def _is_done(self, rank: int) -> bool:
        if self.store.check(["refused"]):
            raise RequestError(self.store.get("refused").decode())
        return self.store.check([f"{self._works}/{rank}"])

    @contextlib.contextmanager
    def _beating(self) -> Iterator[None]:
        stop = threading.Event()

        def beat() -> None:
            with contextlib.suppress(RuntimeError):  # the store is closed: the main thread notices
                while not stop.wait(BEAT_SECONDS):
                    self.store.add(f"beats/{self.rank}", 1)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _wait_for(self, is_there: Callable[[int], bool], problem: str) -> None:
        """Wait until a condition holds for every process, but only while the missing processes send heartbeats."""
        seen: dict[int, tuple[int, float]] = {}
        missing = list(range(self.world))
        while missing := [rank for rank in missing if not is_there(rank)]:
            for rank in missing:
                beats = self.store.add(f"beats/{rank}", 0) if hasattr(self, "store") else 0
                if rank not in seen or beats != seen[rank][0]:
                    seen[rank] = beats, time.monotonic()
                elif time.monotonic() - seen[rank][1] > self.seconds:
                    raise PeerLost(f"process {rank} of {self.world} {problem} within {self.seconds:g} s")
            time.sleep(POLL_SECONDS)


def _choose_interface(address: str) -> None:
    """Make gloo use the network that leads to the first machine.

    By default gloo uses the address of the machine's own host name, which is often one that others cannot reach.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = fcntl.ioctl(probe, _ADDRESS_OF_INTERFACE, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(request[20:24]) == own:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    return
