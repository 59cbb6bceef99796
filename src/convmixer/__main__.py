"""The program `convmixer`, also started by `python -m convmixer` and `torchrun -m convmixer`."""

import sys

from convmixer.cli import main
from convmixer.processes import run_program


def run() -> int | None:
    """Run the command line on the arguments of this process, and return its exit status."""
    return run_program(main)


if __name__ == "__main__":
    sys.exit(run())
