"""Compares the order of the arms in two studies, for instance after 10 and after 100 epochs."""

import statistics
from collections.abc import Sequence
from itertools import combinations

from convmixer.errors import RequestError
from convmixer.results.statistics import Interval, paired_difference
from convmixer.results.study import StudyResults


def shared_arms(here: StudyResults, there: StudyResults) -> list[str]:
    """Return the arms with the same name and model that have test accuracies in both studies, the best first.

    Raises:
        RequestError: The studies have different data, or share fewer than two such arms.
    """
    if here.plan["data"]["checksum"] != there.plan["data"]["checksum"]:
        raise RequestError(f"{there.folder} was run on other data than {here.folder}")
    mine, theirs = here.plan["arms"], there.plan["arms"]
    found = [
        arm
        for arm in mine
        if arm in theirs
        and mine[arm]["build"] == theirs[arm]["build"]
        and here.values(arm, "test_top1")
        and there.values(arm, "test_top1")
    ]
    if len(found) < 2:
        raise RequestError(f"{here.folder} and {there.folder} share fewer than two arms that have run")
    return sorted(found, key=lambda arm: -_mean(here, arm))


def order_table(here: StudyResults, there: StudyResults) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Return the heads and rows of a table: each shared arm, with its rank and mean test accuracy in each study."""
    arms = shared_arms(here, there)
    before = sorted(arms, key=lambda arm: -_mean(there, arm))
    rows: list[Sequence[str]] = [
        (
            here.plan["arms"][arm]["label"],
            str(arms.index(arm) + 1),
            f"{_mean(here, arm):.2f}",
            str(before.index(arm) + 1),
            f"{_mean(there, arm):.2f}",
        )
        for arm in arms
    ]
    return ("arm", "rank here", "test top-1 % here", "rank there", "test top-1 % there"), rows


def order_sentences(here: StudyResults, there: StudyResults) -> list[str]:
    """Return a sentence for each pair of arms whose order differs, or one sentence if the order is the same.

    A change is clear if the 95% intervals of both differences exclude 0.
    """
    labels = {arm: here.plan["arms"][arm]["label"] for arm in here.plan["arms"]}
    said = []
    for first, second in combinations(shared_arms(here, there), 2):
        now, then = (
            paired_difference(r.values(first, "test_top1"), r.values(second, "test_top1")) for r in (here, there)
        )
        if now and then and now.mean * then.mean < 0:
            clear = "clear" if _excludes_zero(now) and _excludes_zero(then) else "not clear with this many seeds"
            said.append(
                f"{labels[first]} − {labels[second]}: {now.mean:+.2f} here, {then.mean:+.2f} there; the change of "
                f"order is {clear}."
            )
    return said or ["The order of the arms is the same in both studies."]


def _mean(results: StudyResults, arm: str) -> float:
    return statistics.fmean(results.values(arm, "test_top1").values())


def _excludes_zero(interval: Interval) -> bool:
    return interval.low > 0 or interval.high < 0
