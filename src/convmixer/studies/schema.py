"""Reads a study from its YAML file: arms, the recipe they share, seeds, claims. Checks everything, trains nothing.

The file is the pre-registration: the claims and the smallest differences that matter are written before the runs.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from convmixer.config import Config, difference, override, parse_seconds
from convmixer.errors import RequestError, unknown
from convmixer.results.study import SPEEDS, STRUCTURE
from convmixer.studies.arms import check_sizes
from convmixer.studies.tune import Tune, parse_tune

RELATIONS = ("better", "at-least", "same")
MATCH_BY = ("parameters", "macs", "seconds")
# measures that a claim may be about; for each, larger is better
MEASURES = ("test_top1", STRUCTURE, *SPEEDS)
# settings of `train` that a study's recipe must not hold, and what to do instead
ELSEWHERE = {
    "seed": "write `seeds`",
    "model": "write it on the arm",
    "act": "write it on the arm",
    "drop_rate": "arms are built without dropout",
}


@dataclass(frozen=True)
class Arm:
    """One model of a study.

    Args:
        name: Its key in the file; also a part of folder names.
        label: Its name in tables and plots.
        family: A name of `arms.FAMILIES`.
        sizes: Arguments of the family; `match` may replace width or depth.
        fixed: Keep the sizes as they are written, although the study has `match`.
        recipe: Settings of this arm alone; allowed only if the study has `unequal: true`.
    """

    name: str
    label: str
    family: str
    sizes: dict[str, Any]
    fixed: bool = False
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """How arms are made equal: the size `solve` of each is chosen so that its quantity `by` equals that of `like`."""

    by: str
    like: str
    solve: str = "dim"
    tolerance: float = 0.03


@dataclass(frozen=True)
class Claim:
    """A statement written before the runs.

    Args:
        says: The sentence.
        first: Name of the arm the sentence is about.
        second: Name of the arm it is compared with. A claim about `kernel_structure` may leave it out: it
            then compares `first` with random kernels, which have 0.
        relation: "better": first - second is at least `matters`. "at-least": first is worse by less than `matters`.
            "same": they differ by less than `matters`.
        matters: Smallest difference that matters, in the unit of the measure (percentage points for accuracy).
        measure: One of MEASURES.
        paper: What the paper reports: `says`, `source`, and `difference` if it can be compared.
        settings: A sentence on how the paper's settings differ from those of the study.
    """

    says: str
    first: str
    relation: str
    matters: float
    second: str = ""
    measure: str = "test_top1"
    paper: dict[str, Any] | None = None
    settings: str = ""


@dataclass(frozen=True)
class Study:
    """A study; docs/studies.md explains its file."""

    name: str
    title: str
    question: str
    data: str
    recipe: Config
    seeds: tuple[int, ...]
    arms: dict[str, Arm]
    claims: tuple[Claim, ...]
    match: Match | None
    budget: str | None
    unequal: bool
    notes: str
    tune: Tune | None = None

    def config(self, arm: str, seed: int) -> Config:
        """Return the settings of one run: the shared recipe, the seed, and the settings of the arm."""
        return dataclasses.replace(override(self.recipe, self.arms[arm].recipe), seed=seed)

    def runs(self) -> list[tuple[str, int]]:
        """Return (arm, seed) of every run, in the order of training: all arms of a seed before the next seed.

        A paired difference needs both arms with the same seed, so a study that stops early has complete pairs.
        """
        return [(arm, seed) for seed in self.seeds for arm in self.arms]


def list_studies() -> list[str]:
    """Return the names of the shipped studies."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def list_titles() -> dict[str, str]:
    """Return name -> title of the shipped studies."""
    return {name: load_study(name).title for name in list_studies()}


def find_study(study: str) -> Path:
    """Return the file of a study given by its shipped name or by path.

    Raises:
        RequestError: There is no such study; the nearest one is suggested.
    """
    if study.endswith((".yaml", ".yml")):
        if not Path(study).is_file():
            raise RequestError(f"there is no study file {study}")
        return Path(study)
    if study not in list_studies():
        raise unknown("study", study, list_studies())
    return Path(__file__).parent / f"{study}.yaml"


def load_study(study: str) -> Study:
    """Return a checked study given by its shipped name or by path.

    Raises:
        RequestError: The file cannot be read, or any part of it is wrong; the message names the part.
    """
    path = find_study(study)
    raw = _read(path)
    try:
        return parse(path.stem, _extended(raw))
    except RequestError as error:
        raise RequestError(f"study {path.name}: {error}") from None


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(f"cannot read the study {path}: {error}") from error


def _extended(raw: Any) -> Any:
    """Return a study, completed with the keys of the shipped study that its key `extends` names.

    Keys in the file replace the same keys of the shipped study. Settings under `recipe` are replaced one by one.
    """
    if not isinstance(raw, dict) or "extends" not in raw:
        return raw
    name = raw["extends"]
    if name not in list_studies():
        raise unknown("study", str(name), list_studies())
    base = _read(find_study(name))
    if "extends" in base:
        raise RequestError(f"extends: {name} extends another study itself: name that one, {base['extends']}")
    own = {key: value for key, value in raw.items() if key != "extends"}
    return base | own | {"recipe": base["recipe"] | dict(_mapping(own.get("recipe", {}), "recipe"))}


def parse(name: str, raw: Any) -> Study:
    """Return the study that plain YAML values describe, after checking it.

    Raises:
        RequestError: A part is missing, unknown or does not fit the others.
    """
    values = _mapping(raw, "the file")
    _keys(values, "study key", [f.name for f in dataclasses.fields(Study) if f.name != "name"])
    _need(values, "study", ("data", "recipe", "seeds", "arms", "claims"))
    unequal = values.get("unequal", False)
    if not isinstance(unequal, bool):
        raise RequestError(f"unequal must be true or false, not {unequal!r}")
    recipe = _recipe(values["recipe"])
    arms = {str(key): _arm(str(key), arm) for key, arm in _mapping(values["arms"], "arms").items()}
    _check_equal(arms, recipe, unequal)
    return Study(
        name=name,
        title=str(values.get("title", name)),
        question=str(values.get("question", "")).strip(),
        data=str(values["data"]),
        recipe=recipe,
        seeds=_seeds(values["seeds"]),
        arms=arms,
        claims=tuple(_claim(claim, arms) for claim in _list(values["claims"], "claims")),
        match=_match(values["match"], arms) if values.get("match") else None,
        budget=_budget(values.get("budget")),
        unequal=unequal,
        notes=str(values.get("notes", "")).strip(),
        tune=parse_tune(dict(_mapping(values["tune"], "tune"))) if values.get("tune") else None,
    )


def _recipe(raw: Any) -> Config:
    values = _mapping(raw, "recipe")
    _refuse_elsewhere(values, "recipe")
    recipe = override(Config(), {"precision": "fp32", **values})
    if recipe.precision == "auto":
        raise RequestError("recipe: precision auto may differ between arms: write fp32 (the default), bf16 or fp16")
    return recipe


def _refuse_elsewhere(recipe: Mapping[str, Any], where: str) -> None:
    for key in recipe:
        if key in ELSEWHERE:
            raise RequestError(f"{where}: {key} is not part of a study's recipe: {ELSEWHERE[key]}")


def _arm(name: str, raw: Any) -> Arm:
    values = dict(_mapping(raw, f"arm {name}"))
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", name):
        raise RequestError(f"arm name {name!r} must be lower-case letters, digits, '-', '_' or '.'")
    try:
        _need(values, "arm", ("model",))
        family, label = str(values.pop("model")), str(values.pop("label", name))
        fixed, recipe = bool(values.pop("fixed", False)), dict(_mapping(values.pop("recipe", {}), "recipe"))
        check_sizes(family, values)
    except RequestError as error:
        raise RequestError(f"arm {name}: {error}") from None
    return Arm(name, label, family, values, fixed, recipe)


def _check_equal(arms: Mapping[str, Arm], recipe: Config, unequal: bool) -> None:
    if len(arms) < 2:
        raise RequestError("a comparison needs at least two arms")
    for arm in arms.values():
        try:
            changed = difference(recipe, override(recipe, arm.recipe))
        except RequestError as error:
            raise RequestError(f"arm {arm.name}: {error}") from None
        _refuse_elsewhere(arm.recipe, f"arm {arm.name}")
        if changed and not unequal:
            raise RequestError(
                f"arm {arm.name} changes the recipe ({', '.join(changed)}), so the comparison would not be equal: "
                "change it for all arms, or write `unequal: true`, and the report will say so at the top"
            )


def _match(raw: Any, arms: Mapping[str, Arm]) -> Match:
    values = _mapping(raw, "match")
    _keys(values, "key of match", [f.name for f in dataclasses.fields(Match)])
    _need(values, "match", ("by", "like"))
    match = Match(**values)
    for kind, value, known in (
        ("match: by", match.by, MATCH_BY),
        ("match: solve", match.solve, ("dim", "depth")),
        ("match: like, an arm", match.like, arms),
    ):
        if not isinstance(value, str) or value not in known:
            raise unknown(kind, str(value), known)
    if not isinstance(match.tolerance, float) or not 0 < match.tolerance < 1:
        raise RequestError(f"match: tolerance must be a share between 0 and 1, not {match.tolerance!r}")
    return match


def _claim(raw: Any, arms: Mapping[str, Arm]) -> Claim:
    values = _mapping(raw, "claim")
    _keys(values, "key of a claim", [f.name for f in dataclasses.fields(Claim)])
    _need(values, "claim", ("says", "first", "relation", "matters"))
    if values.get("measure") != STRUCTURE:
        _need(values, "claim", ("second",))
    claim = Claim(**values)
    for kind, value, known in (
        ("arm in a claim", claim.first, arms),
        ("arm in a claim", claim.second, arms if "second" in values else [""]),
        ("relation", claim.relation, RELATIONS),
        ("measure", claim.measure, MEASURES),
    ):
        if not isinstance(value, str) or value not in known:
            raise unknown(kind, str(value), known)
    _text(claim.says, "says of a claim")
    _text(claim.settings, "settings of a claim")
    if not _is_number(claim.matters) or not claim.matters >= 0:
        raise RequestError(f"matters must be a number of at least 0, not {claim.matters!r}")
    if claim.first == claim.second:
        raise RequestError(f"a claim compares two arms, not {claim.first} with itself")
    if claim.paper:
        _keys(_mapping(claim.paper, "paper"), "key of paper", ("says", "source", "difference"))
        _need(claim.paper, "paper", ("says", "source"))
        _text(claim.paper["says"], "says of paper")
        _text(claim.paper["source"], "source of paper")
        if "difference" in claim.paper and not _is_number(claim.paper["difference"]):
            raise RequestError(f"difference of paper must be a number, not {claim.paper['difference']!r}")
    return claim


def _budget(raw: Any) -> str | None:
    if raw is not None:
        try:
            parse_seconds(raw if isinstance(raw, str) else "")
        except RequestError:
            raise RequestError(f"budget must be a time such as 30m or 2h, not {raw!r}") from None
    return raw


def _text(raw: Any, what: str) -> None:
    if not isinstance(raw, str):
        raise RequestError(f"{what} must be text, not {raw!r}: write it in quotes, or leave the line out")


def _is_number(raw: Any) -> bool:
    return isinstance(raw, (int, float)) and not isinstance(raw, bool)


def _seeds(raw: Any) -> tuple[int, ...]:
    seeds = _list(raw, "seeds")
    if not seeds or not all(type(s) is int and s >= 0 for s in seeds) or len(set(seeds)) != len(seeds):
        raise RequestError(f"seeds must be different whole numbers of at least 0, not {raw!r}")
    return tuple(seeds)


def _mapping(raw: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise RequestError(f"{what} must be `name: value` lines, not {raw!r}")
    return raw


def _list(raw: Any, what: str) -> list[Any]:
    if not isinstance(raw, list):
        raise RequestError(f"{what} must be a list, not {raw!r}")
    return raw


def _keys(values: Iterable[Any], kind: str, known: Iterable[str]) -> None:
    for key in values:
        if key not in set(known):
            raise unknown(kind, str(key), known)


def _need(values: Mapping[str, Any], what: str, keys: Iterable[str]) -> None:
    missing = [key for key in keys if key not in values]
    if missing:
        raise RequestError(f"{what} needs {' and '.join(repr(key) for key in missing)}")
