"""A full disk: one line that names a file; once there is room, the resumed run ends with the same weights."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared import importable

SCRIPT = Path(__file__).parent / "full_disk.py"
PRIVATE = ("unshare", "--map-root-user", "--mount")  # the mount is seen by this process alone


def fill(whole: Path, disk: Path, levels: int) -> None:
    if not shutil.which("unshare") or subprocess.run([*PRIVATE, "true"], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here: unshare --map-root-user --mount does not work")
    command = [*PRIVATE, sys.executable, str(SCRIPT), str(disk), str(whole), str(levels)]
    environment = importable() | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == levels
    failed = [row for row in rows if row["said"]]
    failures = [row for row in rows if row["differs"]]
    failures += [row for row in failed if "No space left on device" not in row["said"]]
    failures += [row for row in failed if f"{disk}/run" not in row["said"]]  # which file
    failures += [row for row in rows if re.search(r"[a-z]Error\b", row["said"])]
    print(f"full disk: {levels} levels, {len(failures)} failures")
    assert not failures, failures
    assert failed


def test_a_full_disk_at_a_few_levels(whole: Path, tmp_path: Path) -> None:
    fill(whole, tmp_path, 3)


@pytest.mark.slow
def test_a_full_disk_at_twenty_levels(whole: Path, tmp_path: Path) -> None:
    fill(whole, tmp_path, 20)
