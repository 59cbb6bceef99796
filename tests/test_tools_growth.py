"""The models of growth: they find known laws again, and the page holds what follows from the record."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from load_tool import load_tool

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def growth() -> ModuleType:
    return load_tool("growth")


def made(growth: ModuleType) -> dict[str, Any]:
    """Return a record of a machine whose laws are known."""

    def step(case: dict[str, int]) -> dict[str, Any]:
        seconds = growth.apply([3e-12, 5e-12, 2e-9, 4e-9, 0.01], growth.terms(case))
        return case | {"seconds": seconds, "bytes": growth.apply([40.0, 16.0, 1e7], growth.memory_terms(case))}

    def start(images: int) -> dict[str, Any]:
        seconds = {"seconds": 2 + 1e-4 * images, "again_seconds": 1 + 1e-5 * images}
        return {"images": images, "bytes": 300 * images} | seconds

    cases = [growth.BASE, *({**growth.BASE, name: v} for name, values in growth.VARIED.items() for v in values)]
    results = {
        "starts": [start(n) for n in (1_000, 5_000, 50_000)],
        "listing": start(1_281_167),
        "steps": [step(case) for case in cases],
        "held_out": step(growth.HELD_OUT),
        "workers": [{"workers": 0, "images_per_second": 5000.0}],
        "processes": [{"processes": 1, "images_per_second": 900.0}],
        "all_reduce": [{"bytes": size, "seconds": 1e-3 + 2e-9 * size} for size in (10**5, 10**7)],
    }
    return {"results": results, "date": "2026-01-01", "environment": {"processor": "made", "cores": 2}}


def test_known_laws_are_found_again(growth: ModuleType) -> None:
    record = made(growth)
    model = growth.models(record["results"])
    assert model["start"] == pytest.approx([1e-4, 2], rel=1e-6)
    assert model["step"] == pytest.approx([3e-12, 5e-12, 2e-9, 4e-9, 0.01], rel=1e-3)
    assert model["step_bytes"] == pytest.approx([40, 16, 1e7], rel=1e-6)
    assert model["all_reduce"] == pytest.approx([2e-9, 1e-3], rel=1e-6)


def test_more_machines_are_faster_but_talk_more(growth: ModuleType) -> None:
    model = growth.models(made(growth)["results"])
    one, eight, many = (growth.predicted(model, machines) for machines in (1, 8, 64))
    assert one["share"] == 0 < eight["share"] < many["share"]
    assert one["epoch"] > eight["epoch"] > many["epoch"] > one["epoch"] / 64


def test_the_section_says_what_is_a_prediction(growth: ModuleType) -> None:
    text = growth.section(made(growth))
    assert "**A prediction, not a measurement**" in text
    assert "1,281,167 rows of a table, which point to 1,000 files | 130.12 s | 13.81 s | 384 MB |" in text
    assert "it predicts 130 s, 14 s and 0.4 GB" in text
    assert "off by -0% to +0%" in text or "off by +0% to +0%" in text


def test_the_page_holds_the_section_of_the_record(growth: ModuleType) -> None:
    text = growth.PAGE.read_text(encoding="utf-8").split(growth.BEGIN)[1].split(growth.END)[0].strip()
    if not growth.RECORD.exists():
        assert text == "Not measured yet."
        return
    record = json.loads(growth.RECORD.read_text(encoding="utf-8").splitlines()[-1])
    assert text == growth.section(record).strip()
