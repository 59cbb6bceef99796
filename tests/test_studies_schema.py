"""Study files: the shipped ones are valid, and every mistake in one is reported before anything trains."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from convmixer.errors import RequestError
from convmixer.probe import macs
from convmixer.studies.arms import build_args
from convmixer.studies.match import count, solve
from convmixer.studies.schema import list_studies, load_study, parse

GOOD: dict[str, Any] = {
    "data": "digits",
    "recipe": {"epochs": 1, "img_size": 32},
    "seeds": [0, 1],
    "match": {"by": "parameters", "like": "a"},
    "arms": {
        "a": {"model": "convmixer", "dim": 32, "depth": 2, "patch_size": 4},
        "b": {"model": "vit", "depth": 2},
    },
    "claims": [{"says": "a wins", "first": "a", "second": "b", "relation": "better", "matters": 1}],
}


def changed(path: str, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(GOOD)
    *parents, last = path.split("/")
    part: Any = raw
    for key in parents:
        part = part[int(key)] if key.isdigit() else part[key]
    part[last] = value
    return raw


def test_shipped_studies() -> None:
    assert {"ablation", "mixers", "models", "smoke", "stems"} < set(list_studies())
    assert list_studies() == sorted(list_studies())


def different() -> list[str]:
    """Return the shipped studies, and of those with the same arms, images and match one alone."""
    studies = {name: load_study(name) for name in list_studies()}
    return list({repr((s.arms, s.match, s.recipe.img_size)): name for name, s in studies.items()}.values())


@pytest.mark.parametrize("name", list_studies())
def test_shipped_studies_ask_and_claim_something(name: str) -> None:
    study = load_study(name)
    assert study.question
    assert study.claims


@pytest.mark.parametrize("name", different())
def test_shipped_studies_can_be_matched(name: str) -> None:
    study = load_study(name)
    size = study.recipe.img_size or 8
    for arm in study.arms.values():
        sizes = arm.sizes
        if study.match and arm.name != study.match.like and not arm.fixed:
            cost = count("parameters", size, 3, 10)
            like = study.arms[study.match.like]
            target = cost(like.family, like.sizes)
            sizes = solve(arm.family, sizes, study.match.solve, target, study.match.tolerance, cost)
            assert abs(cost(arm.family, sizes) / target - 1) <= study.match.tolerance
        assert macs(build_args(arm.family, sizes, size), size, 3, 10) > 1000


def test_arms_compute_in_fp32_where_the_study_does_not_say() -> None:
    study = parse("x", GOOD)
    assert {study.config(arm, 0).precision for arm in study.arms} == {"fp32"}


def test_runs_complete_the_pairs_of_a_seed_first() -> None:
    assert parse("x", GOOD).runs() == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("arm", {}, "unknown study key 'arm': did you mean 'arms'"),
        ("arms", {"a": GOOD["arms"]["a"]}, "at least two arms"),
        ("arms/b/model", "vitt", "arm b: unknown model family 'vitt': did you mean 'vit'"),
        ("arms/b/model", "isotropicc", "did you mean 'isotropic'"),
        ("arms/b/kernel_size", 3, "arm b: unknown key of a vit arm 'kernel_size'"),
        ("arms/b/recipe", {"lr": 0.5}, r"arm b changes the recipe \(lr\), .*`unequal: true`"),
        ("arms/b/recipe", {"lrr": 0.5}, "arm b: unknown setting 'lrr'"),
        ("arms/B c", {"model": "vit"}, "arm name 'B c' must be"),
        ("recipe/epoch", 1, "unknown setting 'epoch': did you mean 'epochs'"),
        ("recipe/precision", "auto", "precision auto may differ between arms"),
        ("recipe/seed", 1, "recipe: seed is not part of a study's recipe: write `seeds`"),
        ("recipe/drop_rate", 0.1, "recipe: drop_rate is not part"),
        ("arms/b/recipe", {"act": "relu"}, "arm b: act is not part of a study's recipe: write it on the arm"),
        ("seeds", [], "seeds must be different whole numbers"),
        ("seeds", [1, 1], "seeds must be different whole numbers"),
        ("seeds", 3, "seeds must be a list"),
        ("match/by", "flops", "unknown match: by 'flops'"),
        ("match/like", "c", "unknown match: like, an arm 'c'"),
        ("match/solve", "kernel_size", "unknown match: solve"),
        ("match/tolerance", 2, "tolerance must be a share"),
        ("match/target", 2, "unknown key of match 'target'"),
        ("claims/0/first", "c", "unknown arm in a claim 'c'"),
        ("claims/0/second", "a", "not a with itself"),
        ("claims/0/second", "", "unknown arm in a claim ''"),
        ("claims/0/relation", "beter", "did you mean 'better'"),
        ("claims/0/matters", -1, "matters must be"),
        ("claims/0/measure", "train_top1", "unknown measure"),
        ("claims/0/paper", {"says": "x"}, "paper needs 'source'"),
        ("claims/0/paper", {"says": "x", "source": 3}, "source of paper must be text, not 3"),
        ("claims/0/paper", {"says": "x", "source": "y", "difference": "two"}, "must be a number, not 'two'"),
        ("claims/0/says", 5, "says of a claim must be text, not 5"),
        ("claims/0/settings", None, "settings of a claim must be text, not None"),
        ("claims/0/first", ["a"], "unknown arm in a claim"),
        ("claims/0/matters", float("nan"), "matters must be"),
        ("budget", "soon", "budget must be a time such as 30m or 2h, not 'soon'"),
        ("budget", 7200, "budget must be a time such as 30m or 2h, not 7200"),
        ("seeds", [[1]], "seeds must be different whole numbers"),
        ("claims/0/papr", {}, "unknown key of a claim 'papr'"),
        ("unequal", "maybe", "unequal must be true or false"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse("x", changed(path, value))


def test_only_a_claim_about_structure_may_leave_out_the_second_arm() -> None:
    one = {key: value for key, value in GOOD["claims"][0].items() if key != "second"}
    with pytest.raises(RequestError, match="claim needs 'second'"):
        parse("x", GOOD | {"claims": [one]})
    assert parse("x", GOOD | {"claims": [one | {"measure": "kernel_structure"}]}).claims[0].second == ""


def test_missing_parts_are_named() -> None:
    with pytest.raises(RequestError, match="study needs 'seeds' and 'claims'"):
        parse("x", {k: v for k, v in GOOD.items() if k not in ("seeds", "claims")})


def test_an_unequal_study_may_change_one_arm() -> None:
    study = parse("x", changed("arms/b/recipe", {"lr": 0.5}) | {"unequal": True})
    assert study.config("b", 7).lr == 0.5
    assert study.config("b", 7).seed == 7
    assert study.config("a", 7).lr == study.recipe.lr


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="did you mean 'smoke'"):
        load_study("smok")
    with pytest.raises(RequestError, match="there is no study file"):
        load_study(str(tmp_path / "none.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("arms: [")
    with pytest.raises(RequestError, match="cannot read the study"):
        load_study(str(broken))
    broken.write_text(yaml.safe_dump(changed("seeds", [])))
    with pytest.raises(RequestError, match=r"study broken\.yaml: seeds"):
        load_study(str(broken))


def test_sizes_that_cannot_match_are_named() -> None:
    cost = count("parameters", 32, 3, 10)
    with pytest.raises(RequestError, match="impossible match: no dim of vit costs within 1% of 1,000"):
        solve("vit", {"depth": 8}, "dim", 1000, 0.01, cost)
    with pytest.raises(RequestError, match="impossible match: no depth of convmixer"):
        solve("convmixer", {"dim": 64}, "depth", 1e9, 0.01, cost)


@pytest.mark.parametrize(("by", "key"), [("parameters", "dim"), ("macs", "dim"), ("parameters", "depth")])
def test_solving_finds_the_nearest(by: str, key: str) -> None:
    cost = count(by, 32, 3, 10)
    sizes = {"dim": 64, "depth": 5, "patch_size": 4}
    target = cost("convmixer", sizes)
    assert solve("convmixer", sizes | {key: 1}, key, target, 0.01, cost) == sizes
