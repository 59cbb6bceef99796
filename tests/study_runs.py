"""Helpers of the tests that run a whole study: a variant of `smoke` that takes seconds, and workers in processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

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


def start(study: Path, out: Path, *more: str, program: str = "convmixer") -> "subprocess.Popen[str]":
    """Start a worker on one thread of plain PyTorch, so that its numbers are the same each time."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CONVMIXER_KERNELS": "0", "PYTHONUNBUFFERED": "1"}
    paths = [str(Path(__file__).parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.Popen(
        [sys.executable, "-m", program, "compare", str(study), "digits", "--out", str(out), *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(worker: "subprocess.Popen[str]") -> str:
    """Return what a worker said to its good end."""
    said = worker.communicate(timeout=300)[0]
    assert worker.returncode == 0, said
    return str(said)


def kill_in_the_middle(worker: "subprocess.Popen[str]", line: str) -> None:
    """Kill a worker as soon as it says that line."""
    assert worker.stdout
    for said in worker.stdout:
        if re.search(line, said):
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            worker.stdout.close()
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
