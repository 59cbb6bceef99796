"""The inputs that fuzzing kept are read again: each quickly gives a result or a refusal."""

from pathlib import Path

import pytest
import torch
from targets import targets

from convmixer.decode import load

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", ["images", "forms", "weights"])
def test_nothing_but_a_refusal_comes_of_the_kept_inputs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for function in ("image_apart", "header_apart"):  # `targets` replaces them for good: put them back afterwards
        monkeypatch.setattr(load, function, getattr(load, function))
    threads = torch.get_num_threads()
    kept = sorted((CORPUS / name).iterdir())
    assert kept
    read = targets(tmp_path)[name]
    try:
        for file in kept:
            read(file.read_bytes())
    finally:
        torch.set_num_threads(threads)
