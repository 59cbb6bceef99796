"""`python -m convmixer`, which `torchrun -m convmixer` needs."""

import sys

from convmixer.cli import main

if __name__ == "__main__":
    sys.exit(main())
