"""The notebooks run from the first cell to the last, and are kept without outputs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from docs_pages import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
# in a process: Jupyter's own sockets are closed by its end
RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=300).execute()
assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "PHOTOS"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    command = [sys.executable, "-c", RUN, str(path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
