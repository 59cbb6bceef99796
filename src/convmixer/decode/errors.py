"""The errors of decoding an image."""

from pathlib import Path


class ImageError(ValueError):
    """An image cannot be read; the message says why, and names the file if there is one."""


class Apart(Exception):
    """An image may take too long or too much memory: it must be decoded in a process that can be killed."""


def named(source: Path | bytes, problem: object) -> ImageError:
    """Return an error that holds the name of the source, if it is a file, and the reason."""
    reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else problem
    return ImageError(str(reason) if isinstance(source, bytes) else f"{source}: {reason}")
