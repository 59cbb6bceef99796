"""What the processes of a test run share: files that one worker makes for all, and modules of the tests."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from convmixer.processes import one_at_a_time


def importable() -> dict[str, str]:
    """Return the environment of a process that imports modules of the tests."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": paths}


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that is filled by the first worker that asks for it, and must not be changed afterwards.

    Args:
        factory: Gives each worker a folder inside the one of the whole test run.
        name: Of the folder.
        make: Fills the folder.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    made = folder.with_suffix(".made")
    with one_at_a_time(folder.with_suffix(".lock")):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder
