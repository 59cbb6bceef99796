"""Machines made of network namespaces: each with its own network, joined by one cable that can be pulled.

Nothing leaves them: they have no route to anywhere else.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PORT = 29511


def why_not() -> str | None:
    """Return why namespaces cannot be made here, or None."""
    if shutil.which("ip") is None:
        return "the command ip is not installed"
    name = f"convmixer-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no right to make network namespaces: {made.stderr.strip()}"
    _ip("netns", "del", name)
    return None


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Machine:
    """One of two machines; the first one's address is 10.213.0.1."""

    def __init__(self, number: int) -> None:
        self.name = f"cmx{os.getpid()}-{number}"
        self.card = f"cmx{os.getpid() % 100000}v{number}"
        self.address = f"10.213.0.{number}"
        self.processes: list[subprocess.Popen[str]] = []

    def start(
        self, command: list[str], environment: dict[str, str], hidden: Path | None = None
    ) -> "subprocess.Popen[str]":
        """Start a command; a hidden folder is empty here, as if it were on the other machine's disk."""
        inside = f'mount -t tmpfs none {hidden} && exec "$@"' if hidden else 'exec "$@"'
        words = ["ip", "netns", "exec", self.name, "sh", "-c", inside, "sh", *command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            words, env={**os.environ, **environment}, text=True, start_new_session=True, **pipes
        )
        self.processes.append(process)
        return process

    def give_up_soon(self) -> None:
        """Let connections end after some 20 s without an answer, not 15 minutes."""
        _ip("netns", "exec", self.name, "sysctl", "-w", "net.ipv4.tcp_retries2=5")

    def pull(self) -> None:
        """Pull the cable."""
        _ip("-n", self.name, "link", "set", self.card, "down")

    def plug(self) -> None:
        """Put the cable back."""
        _ip("-n", self.name, "link", "set", self.card, "up")

    def die(self) -> None:
        """End at once, without a word on the network."""
        self.pull()
        self.end()

    def end(self) -> None:
        """Kill what runs here."""
        for number in self._running():
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def kill_one(self) -> None:
        """Kill the process that trains; torchrun stays."""
        words = {number: Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0") for number in self._running()}
        (trainer,) = (number for number, found in words.items() if found[1:4] == [b"-u", b"-m", b"convmixer"])
        os.kill(trainer, signal.SIGKILL)

    def _running(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        return [int(number) for number in found.stdout.split()]


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    first, second = machines = Machine(1), Machine(2)
    try:
        for machine in machines:
            _ip("netns", "add", machine.name)
        _ip("link", "add", first.card, "netns", first.name, "type", "veth", "peer", second.card, "netns", second.name)
        for machine in machines:
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", machine.card)
            for card in ("lo", machine.card):
                _ip("-n", machine.name, "link", "set", card, "up")
        yield first, second
    finally:
        for machine in machines:
            machine.end()
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True)
            for process in machine.processes:
                with suppress(ValueError):
                    process.communicate()


def torchrun(machine: Machine, nodes: str, restarts: int = 0) -> list[str]:
    """Return the command that starts one process of a group on each machine; the first one holds the store."""
    first = machine.address.endswith(".1")
    words = ["--nnodes", nodes, "--nproc-per-node", "1", "--rdzv-id", "test", "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", f"10.213.0.1:{PORT}", "--rdzv-conf", f"is_host={int(first)},last_call_timeout=5"]
    words += ["--local-addr", machine.address, "--max-restarts", str(restarts)]
    return [sys.executable, "-m", "torch.distributed.run", *words]
