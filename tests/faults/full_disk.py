"""Train on a disk of a few sizes and print one line of JSON each: level, what was said, what differs after a resume.

unshare --map-root-user --mount python full_disk.py EMPTY_FOLDER WHOLE_RUN LEVELS
"""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

from fault_runs import differences, settings

from convmixer import cli
from convmixer.train.run import resume, train

ROOM = 64 << 20


def main(disk: Path, whole: Path, levels: int) -> None:
    """Fill the disk except for a part of what the run needs, train, make room, resume; then the next level."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(disk)], check=True)
    needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    for level in range(levels):
        free = int(needed * 1.1 * level / levels) + 4096
        filler, run = disk / "filler", disk / f"run{level}"
        with filler.open("wb") as file:
            file.write(bytes(ROOM - used(disk) - free))
        said = attempt(run)
        filler.unlink()
        print(json.dumps({"free": free, "said": said, "differs": finish(whole, run)}), flush=True)
        subprocess.run(["rm", "-rf", str(run)], check=True)


def used(disk: Path) -> int:
    """Return the bytes in use on the disk."""
    out = subprocess.run(["df", "--output=used", "-B1", str(disk)], check=True, capture_output=True, text=True)
    return int(out.stdout.split()[1])


def attempt(run: Path) -> str:
    """Return the line that the command would end with, or "" if the run ended well."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            train("digits", settings(draw=True), out=run)
        except Exception as error:
            cli._fail(cli._parser().parse_args(["train"]), error, 1)
            return said.getvalue().splitlines()[-1]
    return ""


def finish(whole: Path, run: Path) -> list[str]:
    """Return how the run differs from the undisturbed one, once there is room again."""
    with contextlib.redirect_stdout(io.StringIO()):
        if (run / "config.yaml").exists():
            resume(run)
        else:
            train("digits", settings(draw=True), out=run)
    return differences(whole, run)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
