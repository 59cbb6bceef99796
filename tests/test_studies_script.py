"""The script that trains studies for a stated time and packs them for the next machine."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from convmixer.results.study import StudyResults
from study_runs import numbers, tiny

SCRIPT = Path(__file__).parents[1] / "tools" / "run_studies.py"


def run(folder: Path, study: Path, time: str) -> str:
    command = [sys.executable, str(SCRIPT), "studies", str(study), "--data", "digits", "--time", time]
    ended = subprocess.run(
        [*command, "--side-by-side", "2", "--pack", "studies.tar"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_a_study_cut_by_the_clock_goes_on_elsewhere_from_the_archive(tmp_path: Path) -> None:
    study = tiny(tmp_path, seeds=[0, 1, 2])
    raw = yaml.safe_load(study.read_text())
    raw["recipe"] |= {"epochs": 40}
    study.write_text(yaml.safe_dump(raw))
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    said = run(here, study, "60s")
    assert "2 of 2 workers stopped by the clock" in said
    with tarfile.open(here / "studies.tar") as tar:
        names = tar.getnames()
        tar.extractall(there, filter="data")
    assert not any(name.endswith("queue.db") for name in names)
    assert any(name.endswith("latest.pt") for name in names)  # of the runs that were cut
    before = numbers(here / "studies" / "tiny")
    said = run(there, study, "300s")
    assert "0 runs left" in said
    out = there / "studies" / "tiny"
    assert not StudyResults(out).missing
    assert {name: numbers(out)[name] for name in before} == before
    with tarfile.open(there / "studies.tar") as tar:
        kept = [name for name in tar.getnames() if name.endswith("model.safetensors")]
    assert sorted(kept) == [
        f"studies/tiny/runs/{arm}-seed0/weights/best/model.safetensors" for arm in ("depthwise", "none")
    ]
