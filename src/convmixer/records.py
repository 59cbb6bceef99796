"""Records: a measured result with everything needed to judge and repeat it, as JSON lines. Uses no torch or numpy."""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convmixer.device import gpu_names, total_bytes
from convmixer.files import naming, write_atomic

_DIGEST = "sha256"
_PACKAGES = (
    "convmixer",
    "torch",
    "torchvision",
    "timm",
    "pytorch-lightning",
    "numpy",
    "pillow",
    "onnxruntime",
    "openvino",
)


@dataclass(frozen=True)
class RunRecord:
    """One result.

    Args:
        name: Name of the measurement, e.g. "authors-cifar10-seed0".
        command: The command line that repeats it.
        config: The resolved settings.
        data: Name, checksum and sizes of the data.
        results: Name -> number; the name contains the unit.
        seed: The seed, or None if nothing is random.
        environment: Machine and versions, see `environment`.
        date: ISO date and time, UTC.
    """

    name: str
    command: str
    config: dict[str, Any]
    data: dict[str, Any]
    results: dict[str, Any]
    seed: int | None = None
    environment: dict[str, Any] = field(default_factory=lambda: environment())
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))


def environment() -> dict[str, Any]:
    """Return the machine (processor, cores, memory, GPUs), the versions of the libraries, and the commit."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "memory_bytes": total_bytes(),
        "gpus": gpu_names(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := version_of(name))},
        "commit": commit(),
    }


def processor_name() -> str:
    """Return the processor's name, with family and model if the system reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    info: dict[str, str] = {}
    for key, _, value in (line.partition(":") for line in lines):
        info.setdefault(key.strip(), value.strip())
    name = info.get("model name", platform.machine())
    return f"{name} family {info['cpu family']} model {info['model']}" if "cpu family" in info else name


def command_line() -> str:
    """Return the running command as a user would type it."""
    program = Path(sys.argv[0]).name.removesuffix(".py")
    return shlex.join(["convmixer" if program in ("convmixer", "__main__") else program, *sys.argv[1:]])


def append(path: Path, record: RunRecord) -> None:
    """Add a record as one line at the end of a JSON-lines file; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(_line(record))


def write(path: Path, record: RunRecord) -> None:
    """Write a JSON-lines file with one record, atomically."""
    write_atomic(path, _line(record).encode())


def _line(record: RunRecord) -> str:
    """Return a record as a line of JSON with a digest as its last entry."""
    contents = dataclasses.asdict(record)
    return json.dumps(contents | {_DIGEST: _digest(contents)}) + "\n"


def _digest(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _parse(line: str) -> RunRecord:
    contents = json.loads(line)
    digest = contents.pop(_DIGEST, None)
    if digest not in (None, _digest(contents)):
        raise ValueError("its digest does not match")
    return RunRecord(**contents)


def read(path: Path) -> list[RunRecord]:
    """Return the records of a JSON-lines file, in order. Records of older versions have no digest to check.

    Raises:
        ValueError: A line is not a record or is damaged; the message names file and line.
    """
    records = []
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            records.append(_parse(line))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number} is not a record: {error}") from error
    return records


def commit() -> str | None:
    """Return the commit of the source tree, with "-dirty" if it has changes; None outside a checkout of convmixer.

    An installed package may be inside the checkout of another project; that project's commit is not returned.
    """
    own = ["git", "ls-files", "--error-unmatch", Path(__file__).name]
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        for command in (own, describe):
            done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
            if done.returncode:
                return None
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
