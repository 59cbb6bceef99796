"""Shared fixtures. Real data come from the environment variable CONVMIXER_DATA or ../shared/data, else tests skip."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """The folder of the real CIFAR-10 parquet files."""
    for folder in (os.environ.get("CONVMIXER_DATA"), ROOT.parent / "shared" / "data"):
        if folder and (Path(folder) / "cifar10").is_dir():
            return Path(folder) / "cifar10"
    pytest.skip("real CIFAR-10 not found: set CONVMIXER_DATA to the folder that holds cifar10/")
