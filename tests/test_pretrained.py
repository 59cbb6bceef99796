"""The weights inside the package: complete, small, and as accurate as their model card says."""

from pathlib import Path

import pytest

from convmixer import records
from convmixer.evaluation.val import val
from convmixer.models.registry import SHIPPED, shipped
from convmixer.models.weights import load_model
from convmixer.studies.verify import verify

FILES = {"README.md", "config.json", "config.yaml", "log.jsonl", "metrics.csv", "model.safetensors", "record.jsonl"}


@pytest.mark.parametrize("name", shipped())
def test_the_card_gives_the_recorded_accuracy(name: str) -> None:
    folder = SHIPPED / name
    assert {path.name for path in folder.iterdir()} == FILES
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
    (record,) = records.read(folder / "record.jsonl")
    results, card = record.results, (folder / "README.md").read_text()
    assert f"| {results['test_n']} | read once, at the end | {results['test_top1']:.2f} |" in card
    assert f"`{record.command}`" in card
    assert f"seed {record.seed}," in card
    assert load_model(name).metadata["data"]["checksum"] == record.data["checksum"]


@pytest.mark.parametrize("name", shipped())
def test_a_thousand_images_are_as_accurate_as_recorded(name: str, cifar10: Path) -> None:
    result = val(name, str(cifar10), limit=1000)
    (record,) = records.read(SHIPPED / name / "record.jsonl")
    low, high = result["ci95"]
    assert low < record.results["test_top1"] < high


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped())
def test_the_recorded_accuracy_holds(name: str, cifar10: Path) -> None:
    result = verify(SHIPPED / name / "record.jsonl", str(cifar10))
    assert result["holds"]
    assert result["records"][0]["recorded"] >= 92
