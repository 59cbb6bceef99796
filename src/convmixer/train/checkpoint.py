"""Checkpoints: a kill at any moment leaves an intact one, and a single wrong bit is detected.

The newest two are kept. A file is what `torch.save` writes, followed by its digest. Files of older versions have no
digest and are not checked.
"""

import hashlib
import io
from pathlib import Path
from typing import Any, BinaryIO

import torch

from convmixer.errors import RequestError
from convmixer.files import atomic_file
from convmixer.run_folder import LATEST, PREVIOUS

_MARK = b"\nconvmixer sha256 "
_TRAILER_BYTES = len(_MARK) + hashlib.sha256().digest_size


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write a state to `folder/LATEST`; the old LATEST becomes `PREVIOUS`.

    Args:
        folder: Created if it is missing.
        state: Tensors, numbers, strings, lists and dicts, as `torch.load` reads them with weights_only.
    """
    with atomic_file(folder / LATEST, keep=folder / PREVIOUS) as file:
        hashing = _Hashing(file)
        torch.save(state, hashing)  # type: ignore[arg-type]
        hashing.check()
        file.write(_MARK + hashing.digest.digest())


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the newest intact state, or None if no checkpoint was ever written. Print a line for a damaged
    checkpoint.

    Raises:
        RequestError: There are checkpoints, but none of them is intact.
    """
    broken = []
    for path in (folder / LATEST, folder / PREVIOUS):
        if path.exists():
            try:
                state = _read(path)
            except (OSError, ValueError) as error:
                broken.append(f"{path.name}: {error}")
                continue
            if broken:
                print(f"damaged checkpoint {folder / broken[0]}; continuing from {path.name}, which is intact")
            return state
    if broken:
        raise RequestError(f"no checkpoint in {folder} can be read ({'; '.join(broken)}): start a new run")
    return None


def _read(path: Path) -> dict[str, Any]:
    """Return the state in a file.

    Raises:
        ValueError: The file is damaged.
    """
    content = path.read_bytes()
    body, trailer = content[:-_TRAILER_BYTES], content[-_TRAILER_BYTES:]
    if trailer.startswith(_MARK):
        if hashlib.sha256(body).digest() != trailer[len(_MARK) :]:
            raise ValueError("its contents do not match its digest")
        content = body
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises many types
        raise ValueError(f"it is cut or damaged ({' '.join(str(error).split())[:80]})") from error
    if not isinstance(state, dict):
        raise ValueError("it does not hold the state of a run")
    return state


class _Hashing:
    """A writable file that hashes what is written. If the disk is full, `check` raises the error.

    If `write` raised the error, torch would replace it by its own error, "unexpected pos".
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes; after an error, do nothing."""
        if self._error is None:
            self.digest.update(data)
            try:
                self.file.write(data)
            except OSError as error:
                self._error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Do nothing: the file is flushed at its end."""

    def check(self) -> None:
        """Raise the first error of writing, if there was one."""
        if self._error is not None:
            raise self._error
