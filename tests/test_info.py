"""`info` shows what runs here, with and without kernels; `--version` shows only the version."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from convmixer import __version__, records
from convmixer.cli import main
from convmixer.info import info, lacks
from convmixer.kernels import available


def test_names_versions_and_built_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    found = info()
    assert found["versions"]["torch"] == torch.__version__
    assert found["kernels"]["available"] is available()
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert not available() or found["kernels"]["level"] in shown


def test_says_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CONVMIXER_KERNELS", "0")
    assert info()["kernels"]["available"] is False
    assert "CONVMIXER_KERNELS=0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "extra", "expected"),
    [
        ("torch>=2", "", False),
        ("torch>=99", "", True),
        ("a-package-that-nobody-has", "", True),
        ("a-package-that-nobody-has", "serve", False),  # the package itself lacks it, not the extra
        ('a-package-that-nobody-has>=1; extra == "serve"', "serve", True),
        ('a-package-that-nobody-has>=1; extra == "serve"', "export", False),
        ('a-package-that-nobody-has; python_version < "3" and extra == "serve"', "serve", False),
        ('torch>=99; extra == "serve"', "serve", True),
    ],
)
def test_a_package_is_missing_if_it_is_needed_and_not_there_or_too_old(line: str, extra: str, expected: bool) -> None:
    assert lacks(Requirement(line), extra) is expected


def test_only_what_dev_leaves_out_is_missing_where_the_suite_runs(capsys: pytest.CaptureFixture[str]) -> None:
    missing = info()["missing"]
    assert set(missing) <= {"remote"}  # clients of clouds
    assert ("s3fs" if missing else "missing     nothing") in capsys.readouterr().out


def test_version_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"convmixer {__version__}\n"


def test_the_commit_is_the_package_s_own_not_that_of_a_project_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    file = tmp_path / "records.py"
    file.touch()
    monkeypatch.setattr(records, "__file__", str(file))
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "another project")
    assert records.commit() is None
    git("add", "records.py")
    git("commit", "-q", "-m", "the package")
    assert re.fullmatch(r"[0-9a-f]{12,}", records.commit() or "")
