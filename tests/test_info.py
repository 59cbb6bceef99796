"""`info` says what runs here, with and without kernels; `--version` the version alone."""

import pytest
import torch

from convmixer import __version__
from convmixer.cli import main
from convmixer.info import info
from convmixer.kernels import available


def test_names_versions_and_built_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    found = info()
    assert found["versions"]["torch"] == torch.__version__
    assert found["kernels"]["available"] is available()
    assert torch.__version__ in capsys.readouterr().out


def test_says_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CONVMIXER_KERNELS", "0")
    assert info()["kernels"]["available"] is False
    assert "CONVMIXER_KERNELS=0" in capsys.readouterr().out


def test_version_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"convmixer {__version__}\n"
