"""Stores the results of the latest benchmarks on this machine next to the built library, for `info`."""

import json
from pathlib import Path
from typing import Any

from convmixer.files import write_atomic
from convmixer.kernels.cpu import build


def keep(result: dict[str, Any]) -> None:
    """Keep one result of `benchmark`; it replaces the previous result of the same case."""
    name = f"{result['task']} {result['model']}, batch {result['batch_size']}, {result['precision']}"
    kept = _kept() | {name: {key: result[key] for key in ("ours", "best_peer", "ratio")}}
    write_atomic(_path(), json.dumps(kept, indent=1).encode())


def fared() -> list[str]:
    """Return one line per case that was measured with this build of the kernels."""
    return [_line(name, row) for name, row in _kept().items()]


def _line(name: str, row: dict[str, Any]) -> str:
    rate = f"{name}: {row['ours']['images_per_second']:.4g} images/s"
    return f"{rate}, {row['ratio']:.2f} times {row['best_peer']}" if row["best_peer"] else rate


def _kept() -> dict[str, Any]:
    try:
        return dict(json.loads(_path().read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _path() -> Path:
    return build.library().parent / "benchmark.json"
