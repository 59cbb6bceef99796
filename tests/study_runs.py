"""Helpers of the tests that run a whole study: a variant of `smoke` that takes seconds, and workers in processes."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import Command
from convmixer.studies.schema import find_study


def tiny(folder: Path, **changes: Any) -> Path:
    """Write a variant of the smoke study that takes seconds."""
    raw = yaml.safe_load(find_study("smoke").read_text(encoding="utf-8"))
    raw["recipe"] |= {"epochs": 2, "precision": "fp32", "checkpoint_seconds": 0.2, "draw": False}
    for arm in raw["arms"].values():
        arm["depth"] = 1
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw | changes))
    return path


def start(study: Path, out: Path, *more: str, in_one_process: bool = False) -> Command:
    """Start a worker on one thread of plain PyTorch, so that its numbers are the same each time."""
    words = ("compare", str(study), "digits", "--out", str(out), *more)
    return Command(*words, in_one_process=in_one_process, OMP_NUM_THREADS="1", CONVMIXER_KERNELS="0")


def kill_in_the_middle(worker: Command, line: str) -> None:
    """Kill a worker as soon as it says that line."""
    with worker.stdout:
        for said in worker.stdout:
            if re.search(line, said):
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
                return
    pytest.fail(f"the worker ended before it said {line}")


def numbers(out: Path) -> dict[str, tuple[float, float]]:
    """Return run -> test accuracy and loss, all digits."""
    found = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert len(found) == len({r["name"] for r in found})
    return {r["name"]: (r["results"]["test_top1"], r["results"]["test_loss"]) for r in found}


def without(whole: Path, out: Path, *runs: str) -> Path:
    """Copy a finished study as if these runs had never started; its queue is left behind."""
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("queue.db", *runs))
    lines = (whole / "records.jsonl").read_text().splitlines(keepends=True)
    (out / "records.jsonl").write_text("".join(line for line in lines if json.loads(line)["name"] not in runs))
    return out
