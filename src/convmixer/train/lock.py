"""The lock of a run folder: one process at a time trains there, and the lock of a dead process does not block.

The lock is a file that names the machine and process id of its holder. The holder touches the file every few seconds.
A holder on this machine counts as alive if its process exists. A holder on another machine counts as alive as long as
it touches the file.
"""

import contextlib
import json
import os
import secrets
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from convmixer.errors import Failed, RequestError
from convmixer.files import naming, temporary_name
from convmixer.processes import is_alive, is_here, one_at_a_time, sign

BEAT_SECONDS = 5.0
DEAD_AFTER_SECONDS = 30.0  # six beats: a machine may be swapping, or a network file system slow


class RunLock:
    """Context in which only this process trains in a run folder.

    Args:
        path: The lock file; its folder exists.

    Raises:
        RequestError: Another process trains there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = False  # another process took the lock, because this one was silent for too long
        self._own = json.dumps(sign() | {"token": secrets.token_hex(8)})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "RunLock":
        while not self._try():
            self._wait_for_holder()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._read() == self._own:
            self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise RuntimeError if another process has taken the lock."""
        if self.lost:
            raise Failed(f"another process took over {self.path.parent} while this one did not respond")

    def _try(self) -> bool:
        """Return whether the lock was free and is ours now."""
        draft = temporary_name(self.path)
        with naming(self.path):
            draft.write_text(self._own, encoding="utf-8")
        try:
            _link(draft, self.path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _wait_for_holder(self) -> None:
        """Remove the lock if its holder is dead. A holder on another machine gets time to show that it is alive.

        Raises:
            RequestError: The holder is alive.
        """
        text = self._read()
        if text is None:
            return
        holder = _parse(text)
        here = is_here(holder)
        if here and is_alive(holder):
            raise self._held(holder)
        if not here:
            self._watch(text, holder)
        self._remove(text)

    def _watch(self, text: str, holder: dict[str, Any]) -> None:
        first, deadline = self._touched(), time.monotonic() + DEAD_AFTER_SECONDS
        print(f"{self.path.parent}: waiting {DEAD_AFTER_SECONDS:.0f} s to see whether {_name(holder)} is alive")
        while time.monotonic() < deadline:
            if self._read() != text:
                return
            if self._touched() != first:
                raise self._held(holder)
            time.sleep(min(0.2, DEAD_AFTER_SECONDS / 10))

    def _remove(self, text: str) -> None:
        """Remove the lock if it is still the dead holder's; if several processes try, only one succeeds."""
        aside = temporary_name(self.path)
        with contextlib.suppress(FileNotFoundError), one_at_a_time(self.path.parent):
            if self._read() == text:
                self.path.replace(aside)
                aside.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            if self._read() not in (self._own, None):
                self.lost = True
                return
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _read(self) -> str | None:
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        except OSError:  # a network file system that is briefly unavailable
            return self._own if self._thread.is_alive() else None

    def _touched(self) -> int:
        with contextlib.suppress(OSError):
            return self.path.stat().st_mtime_ns
        return 0

    def _held(self, holder: dict[str, Any]) -> RequestError:
        return RequestError(f"{self.path.parent} is in use by {_name(holder)}: wait for it, or stop it")


def _link(draft: Path, path: Path) -> None:
    """Give a draft its final name, unless a file has that name already; atomic on network file systems too.

    Raises:
        FileExistsError: A file has the name already.
    """
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links, e.g. on a USB stick
        with path.open("x", encoding="utf-8") as file:
            file.write(draft.read_text(encoding="utf-8"))


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {str(holder.get('host', '?'))[:100]}"


def _parse(text: str) -> dict[str, Any]:
    try:
        holder = json.loads(text)
    except ValueError:
        holder = None
    return holder if isinstance(holder, dict) else {}
