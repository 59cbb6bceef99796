"""Keeps progress lines and warnings of other libraries off the terminal while they convert a model."""

import logging
import warnings
from typing import Any


class quiet(warnings.catch_warnings):
    """Hides warnings and log messages up to level WARNING inside a `with` block. Source: ours."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)

    def __exit__(self, *args: Any) -> None:
        logging.disable(logging.NOTSET)
        super().__exit__(*args)
