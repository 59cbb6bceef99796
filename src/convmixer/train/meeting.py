"""How the processes of one start find each other, and how each notices that another is gone.

They talk through torchrun's store, which outlives restarts: it still holds what the processes of earlier attempts
wrote. So the first process gives each attempt a unique name, and starts only with those that answered to it.
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
        seconds: How long to wait for a sign of life from another one.

    Attributes:
        store: Where they exchange addresses; without what earlier attempts wrote.
        restarted: Whether torchrun restarted any of these processes.

    Raises:
        PeerLost: One did not come in time.
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
        self._wait_for(lambda rank: self._every.check([f"{name}/{rank}"]), "did not come")
        answers = [json.loads(self._every.get(f"{name}/{rank}")) for rank in range(self.world)]
        restarted = again or any(restarted for _, restarted in answers)
        self._every.set(f"{name}/begin", json.dumps([[own for own, _ in answers], restarted]))
        return name, restarted

    def _follow(self) -> tuple[str, bool]:
        """Answer to the newest attempt until it includes this process."""
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
        raise PeerLost(f"the first of {self.world} processes did not come within {self.seconds:g} s")

    def _answer(self, name: str) -> None:
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        self._every.set(f"{name}/{self.rank}", json.dumps([self._own, restarted]))

    # Work whose duration differs between processes

    def everywhere(self, work: Callable[[], T]) -> T:
        """Do something in all processes and continue together; if one raises RequestError, all do.

        It may take long in one, e.g. to fetch data: the others wait as long as it gives signs of life.

        Raises:
            PeerLost: A process no longer gives signs of life.
        """
        self._works += 1
        with self._beating():
            try:
                done = work()
            except RequestError as error:
                self.store.set("refused", f"{error} (process {self.rank} on {socket.gethostname()})")
                raise
            self.store.set(f"{self._works}/{self.rank}", "done")
            self._wait_for(self._is_done, "gives no sign of life")
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
        """Wait until a condition holds for every process, as long as each that it does not yet hold for is alive."""
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
    """Make gloo use the network that leads to the first machine; by default it uses the one of the own host name."""
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
