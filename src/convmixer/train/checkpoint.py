"""Checkpoints that survive a kill at any moment: written beside, synced, renamed over; the one before is kept."""

from pathlib import Path
from typing import Any

import torch

from convmixer.errors import RequestError
from convmixer.files import atomic_file
from convmixer.run_folder import LATEST, PREVIOUS


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write a state to `folder/latest.pt`; what that was becomes `previous.pt`.

    Args:
        folder: Made if it is missing.
        state: Tensors, numbers, strings, lists and dicts: what `torch.load` reads with weights_only.
    """
    with atomic_file(folder / LATEST, keep=folder / PREVIOUS) as file:
        torch.save(state, file)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the newest state that can be read, or None where none was ever written.

    Raises:
        RequestError: There are checkpoints but none can be read.
    """
    broken = []
    for path in (folder / LATEST, folder / PREVIOUS):
        if path.exists():
            try:
                state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
                return state
            except Exception as error:  # a damaged archive raises many types
                broken.append(f"{path.name}: {' '.join(str(error).split())[:80]}")
    if broken:
        raise RequestError(f"no checkpoint in {folder} can be read ({'; '.join(broken)}); start the run anew")
    return None
