"""Equal tuning effort for every arm: the key `tune` of a study, and the values that its trials try."""

from dataclasses import dataclass
from typing import Any

from convmixer.errors import RequestError, unknown
from convmixer.studies.space import Space, check_space, suggest

_KEYS = ("settings", "trials", "on", "epochs", "val_fraction")


@dataclass(frozen=True)
class Tune:
    """Trials that every arm gets before its seeds run.

    Args:
        settings: Setting -> range or choices, as in the space of `convmixer tune`.
        trials: Trials of each arm.
        epochs: Length of a trial; None: the recipe's.
        val_fraction: Share of the training images that a trial holds out and is judged on. The runs after the trials,
            one per seed, train on all training images.
    """

    settings: Space
    trials: int
    epochs: int | None = None
    val_fraction: float = 0.1

    def proposals(self) -> list[dict[str, Any]]:
        """Return the settings of each trial, the same for every arm: the recipe unchanged, then quasi-random ones.

        Every arm tries the same values. A sampler that learns from trials would favour the arms whose trials teach it
        more.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.QMCSampler(seed=0, scramble=True, warn_independent_sampling=False)
        study = optuna.create_study(sampler=sampler)
        proposed: list[dict[str, Any]] = [{}]
        for _ in range(self.trials - 1):
            trial = study.ask()
            proposed.append(suggest(trial, self.settings))
            study.tell(trial, 0.0)  # the sampler spreads new values between those it has seen
        return proposed


def parse_tune(values: dict[str, Any]) -> Tune:
    """Return the `tune` section of a study file, after checking it.

    Raises:
        RequestError: A part is missing, unknown or out of range.
    """
    values = {"on" if key is True else key: value for key, value in values.items()}  # YAML reads the key on as true
    for key in values:
        if key not in _KEYS:
            raise unknown("key of tune", str(key), _KEYS)
    settings, trials = values.get("settings"), values.get("trials")
    if not isinstance(settings, dict) or not settings:
        raise RequestError("tune: settings must be `name: {low: A, high: B}` or `name: {choices: [A, B]}` lines")
    if type(trials) is not int or trials < 2:
        raise RequestError(f"tune: trials must be a whole number of at least 2, not {trials!r}")
    if values.get("on", "validation") != "validation":
        raise RequestError(
            f"tune: on must be validation, not {values['on']!r}: the test set is never used to choose settings"
        )
    epochs, held_out = values.get("epochs"), values.get("val_fraction", 0.1)
    if epochs is not None and (type(epochs) is not int or epochs < 1):
        raise RequestError(f"tune: epochs must be a whole number of at least 1, not {epochs!r}")
    if not isinstance(held_out, float) or not 0 < held_out < 1:
        raise RequestError(f"tune: val_fraction must be a share between 0 and 1, not {held_out!r}")
    try:
        check_space(settings)
    except RequestError as error:
        raise RequestError(f"tune: {error}") from None
    return Tune(settings, trials, epochs, held_out)
