"""Settings: types of outside values, unknown names, and the round trip through plain types."""

from pathlib import Path

import pytest

from convmixer import records
from convmixer.config import Config, difference, override, to_dict
from convmixer.errors import RequestError


def test_values_become_the_type_of_their_setting() -> None:
    config = override(
        Config(), {"lr": "1e-3", "batch-size": "32", "scale": "0.75,1", "img_size": "none", "sync_bn": "yes"}
    )
    assert (config.lr, config.batch_size, config.scale) == (0.001, 32, (0.75, 1.0))
    assert config.img_size is None
    assert config.sync_bn is True


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1}, "unknown setting 'learning_rat'"),
        ({"epoch": 1}, "did you mean 'epochs'"),
        ({"epochs": 1.5}, "epochs must be int"),
        ({"epochs": 0}, "epochs must be above 0"),
        ({"lr": "fast"}, "lr must be float"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"scale": [1]}, "scale must be"),
        ({"schedule": "linear"}, "schedule must be one of"),
        ({"val_fraction": 2}, "between 0 and 1"),
        ({"clip_norm": -1}, "clip_norm must be at least 0, not -1"),
        ({"clip_norm": float("nan")}, "clip_norm must be at least 0"),
        ({"weight_decay": -1}, "weight_decay must be at least 0"),
        ({"mixup": -1}, "mixup must be at least 0"),
        ({"workers": -1}, "workers must be auto or at least 0"),
        ({"drop_rate": 2}, "drop_rate must be between 0 and 1"),
        ({"ema_decay": 5}, "ema_decay must be between 0 and 1"),
        ({"mixup_switch_prob": 7}, "mixup_switch_prob must be between 0 and 1"),
        ({"betas": "2,3"}, "betas must be two numbers from 0 to below 1, not 2.0,3.0"),
        ({"lr": float("inf")}, "lr must be finite, not inf"),
        ({"mean": "0.5,nan,0.5"}, "mean must be finite, not 0.5,nan,0.5"),
        ({"scale": "0.5,inf"}, "scale must be finite"),
        ({"batch_size": 10, "grad_accum": 3}, "multiple of grad_accum"),
    ],
)
def test_bad_values_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        override(Config(), values)


def test_recorded_settings_are_in_range() -> None:
    results = Path(__file__).parent.parent / "results"
    recorded = [record for path in results.glob("*/record*.jsonl") for record in records.read(path)]
    assert recorded
    for record in recorded:
        override(Config(), record.config)


def test_round_trip_and_difference() -> None:
    config = Config(lr=0.5, mean=(0.1, 0.2, 0.3), max_time="30m")
    assert override(Config(), to_dict(config)) == config
    assert difference(Config(), config) == {
        "lr": (0.01, 0.5),
        "mean": (None, [0.1, 0.2, 0.3]),
        "max_time": (None, "30m"),
    }
