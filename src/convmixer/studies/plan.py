"""Makes the plan of a study: reads the data, chooses sizes, counts parameters, measures costs.

The plan is plain JSON. It is stored in the study folder and in the queue, so every worker trains the same sizes, and
a report needs only the plan and the records.
"""

import dataclasses
import hashlib
import json
import statistics
from typing import Any

from convmixer import records
from convmixer.config import Config, difference, override, to_dict
from convmixer.data.datasets import DataSplits, load_data
from convmixer.data.options import Options
from convmixer.errors import RequestError
from convmixer.probe import Build, macs
from convmixer.results.study import SPEEDS
from convmixer.studies.arms import build_args, parameters
from convmixer.studies.match import Cost, count, solve
from convmixer.studies.probe import probe, step_cost
from convmixer.studies.schema import Study

Plan = dict[str, Any]


def make_plan(study: Study, data: str) -> Plan:
    """Return the plan of a study; nothing is trained.

    Args:
        study: The study.
        data: The data argument, which replaces the one in the study file.

    Raises:
        RequestError: The data cannot be read, the arms cannot be matched, or an arm cannot take these images.
    """
    found = load_splits(study, data)
    if not found.train or not found.test:
        raise RequestError(f"{data}: a study needs training and test images")
    sizes = _solve_all(study, data, found)
    arms = {name: _arm(study, name, sizes[name], found) for name in study.arms}
    return {
        "name": study.name,
        "identity": identity(study),
        "title": study.title,
        "question": study.question,
        "notes": study.notes,
        "unequal": study.unequal,
        "match": dataclasses.asdict(study.match) if study.match else None,
        "recipe": to_dict(study.recipe),
        "seeds": list(study.seeds),
        "arms": arms,
        "claims": [dataclasses.asdict(claim) for claim in study.claims],
        "runs": [run_name(arm, seed) for arm, seed in study.runs()],
        "tune": _tune(study),
        "data": _describe(found),
        "command": records.command_line(),
        "environment": records.environment(),
    }


def identity(study: Study) -> str:
    """Return the study's name and a short fingerprint of its file.

    Settings that have their default values are left out, so a setting that a newer version adds does not change the
    identity of a study.
    """
    contents = dataclasses.asdict(study) | {"recipe": difference(Config(), study.recipe)}
    if study.tune is None:  # a key that older versions did not know
        del contents["tune"]
    parts = json.dumps(contents, sort_keys=True, default=str)
    return f"{study.name}-{hashlib.sha256(parts.encode()).hexdigest()[:10]}"


def run_name(arm: str, seed: int) -> str:
    """Return the name of a run: its folder below `runs/`."""
    return f"{arm}-seed{seed}"


def trial_name(arm: str, trial: int) -> str:
    """Return the name of an arm's trial: its folder below `runs/`."""
    return f"{arm}-trial{trial}"


def probe_all(plan: Plan, study: Study, report: Any = print) -> dict[str, dict[str, Any]]:
    """Return arm -> the result of `probe`, and print each result.

    If a claim is about speed, all arms are measured in turn, one round per seed. Then the speeds are the medians, and
    `rounds` holds the values of each round.
    """
    rounds = len(study.seeds) if any(claim.measure in SPEEDS for claim in study.claims) else 1
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in plan["arms"]}
    for _ in range(rounds):
        for name, arm in plan["arms"].items():
            build: Build = (arm["build"][0], arm["build"][1])
            cost = probe(plan["data"]["spec"], study.config(name, study.seeds[0]), build)
            measured[name].append(cost)
            report(
                f"{name:<16} {arm['parameters']:>11,} parameters {arm['macs'] / 1e6:>9,.1f} M MACs "
                f"{cost['peak_memory_bytes'] / 2**20:>7,.0f} MiB {cost['train_images_per_second']:>7,.0f} images/s "
                f"{duration(cost['seconds']):>9} a run"
            )
    return {name: _typical(costs) for name, costs in measured.items()}


def _typical(costs: list[dict[str, Any]]) -> dict[str, Any]:
    keys = (*SPEEDS, "peak_memory_bytes", "seconds")
    medians = {key: statistics.median(cost[key] for cost in costs) for key in keys}
    return costs[0] | medians | {"rounds": [{key: cost[key] for key in SPEEDS} for cost in costs]}


def load_splits(study: Study, data: str) -> DataSplits:
    """Return the data as the study's runs read them, except for the seed of a validation split."""
    c = study.recipe
    return load_data(
        data,
        val_fraction=c.val_fraction,
        test_fraction=c.test_fraction,
        seed=0,
        max_bad_fraction=c.max_bad_fraction,
        img_size=c.img_size,
        options=Options.of(c),
    )


def duration(seconds: float) -> str:
    """Return a time in words, e.g. "1 h 05 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _tune(study: Study) -> dict[str, Any] | None:
    """Return the settings of the trials, the same for every arm. All arms try one before any arm tries the next."""
    if study.tune is None:
        return None
    proposals = study.tune.proposals()
    runs = [trial_name(arm, i) for i in range(study.tune.trials) for arm in study.arms]
    return dataclasses.asdict(study.tune) | {"proposals": proposals, "runs": runs}


def _describe(data: DataSplits) -> dict[str, Any]:
    sizes = {name: len(split) if (split := getattr(data, name)) else 0 for name in ("train", "val", "test")}
    return {
        "spec": data.spec,
        "name": data.name,
        "checksum": data.checksum,
        "img_size": data.img_size,
        "in_chans": data.in_chans,
        "classes": list(data.classes),
        **sizes,
    }


def _solve_all(study: Study, data: str, found: DataSplits) -> dict[str, dict[str, Any]]:
    sizes = {name: dict(arm.sizes) for name, arm in study.arms.items()}
    match = study.match
    if match is None:
        return sizes
    cost = _cost(study, data, found, match.by)
    like = study.arms[match.like]
    target = cost(like.family, like.sizes)
    for name, arm in study.arms.items():
        if name != match.like and not arm.fixed:
            try:
                sizes[name] = solve(arm.family, arm.sizes, match.solve, target, match.tolerance, cost)
            except RequestError as error:
                raise RequestError(f"arm {name}: {error}") from None
    return sizes


def _cost(study: Study, data: str, found: DataSplits, by: str) -> Cost:
    if by == "seconds":
        config = study.config(next(iter(study.arms)), study.seeds[0])
        return step_cost(data, config, lambda family, sizes: build_args(family, sizes, found.img_size))
    return count(by, found.img_size, found.in_chans, len(found.classes))


def _arm(study: Study, name: str, sizes: dict[str, Any], data: DataSplits) -> dict[str, Any]:
    arm = study.arms[name]
    try:
        build: Build = build_args(arm.family, sizes, data.img_size)
        shape = (data.img_size, data.in_chans, len(data.classes))
        counts = {"parameters": parameters(build, *shape), "macs": macs(build, *shape)}
    except RequestError as error:
        raise RequestError(f"arm {name}: {error}") from None
    changed = difference(study.recipe, override(study.recipe, arm.recipe))
    changes = {key: {"shared": old, "here": new} for key, (old, new) in changed.items()}
    solved = bool(study.match) and name != study.match.like and not arm.fixed if study.match else False
    return {
        "label": arm.label,
        "family": arm.family,
        "sizes": sizes,
        "solved": study.match.solve if study.match and solved else None,
        "build": list(build),
        "recipe": changes,
        **counts,
    }
