"""Write the API's pages, built from the docstrings, into a folder.

python docs/build_api.py FOLDER
"""

import sys
from pathlib import Path

import pdoc

import convmixer


def build(folder: Path) -> None:
    """Write the pages of the package's public names."""
    for name in convmixer.__all__:  # loaded when first used, and pdoc sees what is loaded
        getattr(convmixer, name)
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("convmixer", output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
