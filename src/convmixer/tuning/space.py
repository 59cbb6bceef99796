"""Reads the search space of `convmixer tune` from a YAML file."""

from pathlib import Path

from convmixer.errors import RequestError
from convmixer.recipes import load_settings
from convmixer.studies.space import Space, check_space

SHIPPED = Path(__file__).with_name("space.yaml")


def load_space(path: Path | None) -> Space:
    """Return the space in a YAML file, the shipped one if no path is given.

    Raises:
        RequestError: The file cannot be read, names no setting, or the setting does not accept a range or choice.
    """
    space = load_settings(path or SHIPPED)
    if not space:
        raise RequestError(f"{path} names no setting to search")
    check_space(space)
    return space
