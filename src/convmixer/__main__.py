"""The program `convmixer`, also started by `python -m convmixer` and `torchrun -m convmixer`."""

from typing import NoReturn

from convmixer.cli import main
from convmixer.processes import run_program


def run() -> NoReturn:
    """Run the command line on the arguments of this process, and end with its exit status."""
    run_program(main)


if __name__ == "__main__":
    run()
