"""Recipes: one file each, with a function that returns the whole `Config`; the command and the expected result are at
the top.
"""

import importlib
from pathlib import Path
from typing import Any

from convmixer.config import Config
from convmixer.errors import RequestError, unknown


def list_recipes() -> list[str]:
    """Return the names of the shipped recipes."""
    files = Path(__file__).parent.glob("[!_]*.py")
    return sorted(file.stem.replace("_", "-") for file in files)


def load_recipe(name: str) -> Config:
    """Return the settings of a shipped recipe.

    Raises:
        RequestError: There is no such recipe; the nearest one is suggested.
    """
    if name not in list_recipes():
        raise unknown("recipe", name, list_recipes())
    config: Config = importlib.import_module(f"convmixer.recipes.{name.replace('-', '_')}").config()
    return config


def load_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file, not yet checked (see `config.override`).

    Raises:
        RequestError: The file is missing or not a YAML mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(f"cannot read settings from {path}: {error}") from error
    if not isinstance(values, dict):
        raise RequestError(f"{path} must hold settings as `name: value` lines")
    return values
