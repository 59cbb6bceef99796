"""Measuring in a fresh process: its result, its error if it fails, and counts checked by hand."""

import os

import pytest

from convmixer.errors import RequestError
from convmixer.probe import fresh, macs, median_seconds


def about_here(variable: str) -> list[object]:
    return [os.getpid(), os.environ.get(variable)]


def refuse() -> None:
    raise RequestError("the reason")


def break_down() -> None:
    raise ValueError("what happened")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))


def test_the_answer_comes_from_another_process_with_its_variables() -> None:
    process, value = fresh(about_here, {"variable": "CONVMIXER_TEST"}, CONVMIXER_TEST="set")
    assert process != os.getpid()
    assert value == "set"


def test_a_failure_is_a_request_error_with_the_last_line() -> None:
    with pytest.raises(RequestError, match=r"^the reason$"):
        fresh(refuse, {})
    with pytest.raises(RequestError, match=r"^ValueError: what happened$"):
        fresh(break_down, {})


def test_macs_by_hand() -> None:
    # positions x (stem + depth x (depthwise + pointwise)) + classifier
    assert macs(("convmixer_32_2_p1_k3", {}), 8, 1, 10) == 64 * (32 + 2 * (32 * 9 + 32 * 32)) + 32 * 10
    with pytest.raises(RequestError, match="does not take 8 px"):
        macs(("isotropic", {"dim": 8, "depth": 1, "mixer": "linear", "img_size": 16}), 8, 3, 10)


def test_the_median_leaves_out_what_warms_up() -> None:
    calls: list[int] = []
    assert median_seconds(lambda: calls.append(0), 3, warm_up=2) >= 0
    assert len(calls) == 5
