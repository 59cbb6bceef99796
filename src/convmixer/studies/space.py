"""Search spaces: checks that settings exist and accept the values, and lets Optuna choose values."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from convmixer.config import Config, override
from convmixer.errors import RequestError

if TYPE_CHECKING:
    import optuna

_KEYS = {"low", "high", "log", "step"}

Space = dict[str, dict[str, Any]]  # setting -> {"choices": [...]} or {"low", "high" and maybe "log", "step"}


def check_space(space: Mapping[str, Any]) -> None:
    """Check every setting of a space.

    Raises:
        RequestError: A line is neither a range nor a list of choices, or the setting does not accept its values.
    """
    for name, values in space.items():
        _check(name, values)


def suggest(trial: "optuna.Trial", space: Space) -> dict[str, Any]:
    """Return a trial's value for every setting of the space."""
    return {name: _suggest(trial, name, values) for name, values in space.items()}


def values_of(params: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """Return the settings of a trial from its parameters, in which a choice is stored as its index."""
    return {
        name: space[name]["choices"][value] if _is_choice(space[name]) else value for name, value in params.items()
    }


def _suggest(trial: "optuna.Trial", name: str, values: dict[str, Any]) -> Any:
    if _is_choice(values):
        choices = values["choices"]
        return choices[trial.suggest_categorical(name, list(range(len(choices))))]
    more = {key: values[key] for key in ("log", "step") if key in values}
    whole = all(isinstance(values[key], int) for key in ("low", "high"))
    ask = trial.suggest_int if whole else trial.suggest_float
    return ask(name, values["low"], values["high"], **more)


def _is_choice(values: Any) -> bool:
    return "choices" in values


def _check(name: str, values: Any) -> None:
    if isinstance(values, dict) and values.keys() == {"choices"} and isinstance(values["choices"], list):
        tried = values["choices"]
    elif isinstance(values, dict) and {"low", "high"} <= values.keys() <= _KEYS:
        tried = [values["low"], values["high"]]
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in tried) or tried[0] >= tried[1]:
            raise RequestError(f"{name}: low must be a number below high, not {tried[0]} and {tried[1]}")
        if values.get("log") and tried[0] <= 0:
            raise RequestError(f"{name}: low must be above 0 if log is true, not {tried[0]}")
    else:
        raise RequestError(f"{name} must be {{low: A, high: B}}, with log: true if wanted, or {{choices: [A, B]}}")
    if not tried:
        raise RequestError(f"{name} has no choices")
    for value in tried:
        override(Config(), {name: value})  # raises for unknown names and values out of range
