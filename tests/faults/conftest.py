"""The undisturbed run that the disturbed ones are compared with."""

from pathlib import Path

import pytest
from fault_runs import settings

from convmixer.train.run import train


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny settings; never to be changed."""
    run = tmp_path_factory.mktemp("faults") / "whole"
    train("digits", settings(draw=True), out=run)
    return run
