"""The inputs that fuzzing kept are read again: each quickly gives a result or a refusal."""

from pathlib import Path

import pytest
from targets import targets

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", ["images", "forms", "weights"])
def test_nothing_but_a_refusal_comes_of_the_kept_inputs(name: str, tmp_path: Path) -> None:
    kept = sorted((CORPUS / name).iterdir())
    assert kept
    read = targets(tmp_path)[name]
    for file in kept:
        read(file.read_bytes())
