"""Train studies for a stated time, several runs side by side, and pack what another machine needs to go on.

    python tools/run_studies.py studies --time 14m --side-by-side 4 --pack studies.tar models-tuned mixers-tuned
    tar xf studies.tar        # elsewhere, then the same command again

Each study is in FOLDER/STUDY. Started studies go on where they stopped. When the time is up, every worker saves a
checkpoint and ends. The archive holds plans, records, trials, reports, the weights of each arm's first seed, and the
checkpoints of runs that have not ended; queues are left out, since they are rebuilt from the records.
"""

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import TextIO

from convmixer.config import parse_seconds
from convmixer.processes import usable_cores
from convmixer.results.study import StudyResults
from convmixer.run_folder import BEST, StudyFolder

GRACE_SECONDS = 60  # for checkpoints at the end
STARTED = "study    run "  # what a worker prints when the queue is filled


def main() -> int:
    """Train, pack, and return 0, or 1 if a worker failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds a folder for every study")
    parser.add_argument("studies", nargs="+", help="shipped studies or study files, the most important first")
    parser.add_argument("--data", default="cifar10", help="data argument of all studies (default: cifar10)")
    parser.add_argument("--time", default="14m", help="stop after this time (default: 14m)")
    parser.add_argument("--side-by-side", type=int, default=1, metavar="N", help="workers at once (default: 1)")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write a .tar of what the next machine needs")
    args = parser.parse_args()
    deadline = time.monotonic() + parse_seconds(args.time, "--time")
    args.folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for study in args.studies:
        if time.monotonic() < deadline:
            failed |= not train(study, args.data, args.folder / Path(study).stem, args.side_by_side, deadline)
    if args.pack:
        pack(args.folder, args.pack)
    return int(failed)


def train(study: str, data: str, out: Path, workers: int, deadline: float) -> bool:
    """Train a study until it or the time ends, and return whether no worker failed."""
    log = out.with_name(f"{out.name}.log")
    command = [sys.executable, "-m", "convmixer", "compare", study, data, "--out", str(out)]
    with log.open("a") as file:
        began = log.stat().st_size
        running = [_start([*command, *(["--resume"] if StudyFolder(out).plan.exists() else [])], file, workers)]
        while time.monotonic() < deadline and any(worker.poll() is None for worker in running):
            if len(running) == 1 and STARTED in log.read_text()[began:]:
                running += [_start([*command, "--worker"], file, workers) for _ in range(workers - 1)]
            time.sleep(0.5)
        codes = [_stop(worker) for worker in running]
    stopped = [code for code in codes if code == 128 + signal.SIGTERM]
    done = StudyResults(out) if StudyFolder(out).plan.exists() else None
    left = len(done.missing) if done else "all"
    print(f"{study}: {left} runs left, {len(stopped)} of {len(codes)} workers stopped by the clock; see {log}")
    return all(code in (0, 128 + signal.SIGTERM) for code in codes)


def _start(command: list[str], log: TextIO, workers: int) -> "subprocess.Popen[bytes]":
    """Start a worker on its share of the cores: threads of several workers on one core would wait for each other."""
    threads = {"OMP_NUM_THREADS": str(max(1, usable_cores() // workers))}
    environment = threads | os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _stop(worker: "subprocess.Popen[bytes]") -> int:
    """Ask a worker to save and end, and return its exit code."""
    if worker.poll() is None:
        worker.terminate()
        try:
            worker.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
    return worker.wait()


def pack(folder: Path, archive: Path) -> None:
    """Write the archive: what is needed to go on, and what is worth keeping."""
    with tarfile.open(archive, "w") as tar:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            if _kept(folder, path):
                tar.add(path, path.relative_to(folder.parent))
    print(f"packed {archive}, {archive.stat().st_size / 1e6:.1f} MB")


def _kept(folder: Path, path: Path) -> bool:
    parts = path.relative_to(folder).parts
    study = StudyFolder(folder / parts[0])
    if path == study.queue or len(parts) < 2 or not study.plan.exists():
        return path.suffix == ".log" and len(parts) == 1
    if parts[1] != "runs":
        return True
    results, run = StudyResults(study.path), parts[2]
    if run in results.missing:
        return True
    first = {f"{arm}-seed{results.plan['seeds'][0]}" for arm in results.plan["arms"]}
    return run in first and path.is_relative_to(study.run(run).weights(BEST))


if __name__ == "__main__":
    sys.exit(main())
