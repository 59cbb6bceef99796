"""Hostile weights, all of tests/faults/hostile_weights.py: refused in one line, within bounds of time and memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from faults.hostile_weights import cases, write_all

# one process for all; it measures each, because a growth that is given back would not show at the end
LOAD = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
import timm, torch
from convmixer.errors import RequestError
from convmixer.models.weights import load_model
for name, source in json.load(sys.stdin).items():
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load_model(source)
        said = "LOADED"
    except RequestError as error:
        said = str(error)
    except BaseException as error:
        said = "RAISED " + repr(error)[:300]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([name, said, time.perf_counter() - start, grown / 1024]), flush=True)
"""
SECONDS, MEGABYTES = 20, 700  # a slow machine; most take milliseconds and nothing
LONG = ("pickle-steps", "tensor-many", "zip-members", "header-large", "json-14")


def load_each(folder: Path, pick: object) -> None:
    sources = write_all(folder, pick)
    text = json.dumps({name: str(path) for name, path in sources.items()})
    done = subprocess.run(
        [sys.executable, "-c", LOAD], input=text, capture_output=True, text=True, timeout=500, cwd=folder
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    stopped = f"ended at {[*sources][len(rows)]}: {done.stderr[-500:]}" if len(rows) < len(sources) else ""
    assert not stopped
    wrong = [row for row in rows if row[1].startswith(("LOADED", "RAISED"))]
    assert not wrong
    assert not [row for row in rows if "\n" in row[1] or not row[1].isprintable() or len(row[1]) > 600]
    assert not [row for row in rows if row[2] > SECONDS or row[3] > MEGABYTES]
    assert not list(folder.rglob("owned*"))


def is_long(name: str) -> bool:
    return name.startswith(LONG)


def test_hostile_weights_are_refused(tmp_path: Path) -> None:
    load_each(tmp_path, lambda name: not is_long(name))


@pytest.mark.slow
def test_large_hostile_weights_are_refused(tmp_path: Path) -> None:
    load_each(tmp_path, is_long)


def test_there_are_200_of_them() -> None:
    names = [name for name, _ in cases()]
    assert len(names) == len(set(names))
    assert len(names) >= 200
