"""Measures what a model costs in this process instead of a fresh one, which would import everything once more.

test_plan.py, test_probe.py and the slow tests of studies start fresh processes.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest

from convmixer.studies import probe
from convmixer.train import options


def fresh(function: Callable[..., Any], request: dict[str, Any], **_: str) -> Any:
    """Call the function as `convmixer.probe.fresh` does, JSON to JSON, in this process."""
    return json.loads(json.dumps(function(**json.loads(json.dumps(request)))))


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `plan` and `compare` measure in this process."""
    for module in (probe, options):
        monkeypatch.setattr(module, "fresh", fresh)
