"""Write docs/claims.md: each claim of the paper, and what our records say about it.

    python tools/claims.py

Reads results/claims.yaml (which study tests which claim), the records in results/, and the shipped studies for what
has not run yet. Takes seconds; the same records give the same page.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from convmixer.results.report import difference_text, table
from convmixer.results.study import SPEEDS, StudyResults

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "claims.md"
HEAD = """# The paper's claims

{count} of {all} claims have a verdict from our runs, over at least three seeds (for speeds: three rounds of
measurement). `python tools/claims.py` makes this page from [results/claims.yaml](../results/claims.yaml) and the
records; a test checks that they agree.

Each verdict is about the mean of a difference, paired over seeds or rounds: **supported** if its whole 95% interval
agrees with the claim, **contradicted** if the whole interval disagrees, else **not decided**. Each claim
names the smallest difference that matters; "at least as good" and "the same" allow a difference up to that. Both were
written in the study files before the runs. (Speed tables show medians, so subtracting two of their entries does not
give exactly the difference below.) The runs are short and small compared with the paper's: each section says how the
settings differ."""
HEADS = ("test", "difference (95% interval)", "n", "verdict", "the paper's difference", "how its settings differ")


def page() -> str:
    """Return the page as Markdown."""
    claims = yaml.safe_load((ROOT / "results" / "claims.yaml").read_text(encoding="utf-8"))
    found = [_tests(claim) for claim in claims]
    judged = [any(test["n"] >= 3 for test in tests) for tests in found]
    parts = [HEAD.format(count=sum(judged), all=len(claims))]
    rows = [(str(i), c["claim"], _summary(tests)) for i, (c, tests) in enumerate(zip(claims, found, strict=True), 1)]
    parts.append(table(("", "claim", "verdict"), rows))
    for i, (claim, tests) in enumerate(zip(claims, found, strict=True), 1):
        parts.append(f"## {i}. {claim['claim']}")
        parts += _section(claim, tests)
    return "\n\n".join(parts) + "\n"


def _tests(claim: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tests of a claim: what its studies say, with verdicts if they have run."""
    return [
        next(test for test in _of_study(study) if test["says"] == says)
        for study, sentences in claim.get("tests", {}).items()
        for says in sentences
    ]


def _of_study(name: str) -> list[dict[str, Any]]:
    if (ROOT / "results" / name / "study.json").exists():
        results = StudyResults(ROOT / "results" / name)
        return [verdict | {"study": name, "setting": _setting(results)} for verdict in results.verdicts()]
    raw = yaml.safe_load((ROOT / f"src/convmixer/studies/{name}.yaml").read_text(encoding="utf-8"))
    nothing = {"difference": None, "n": 0, "verdict": "not run yet", "study": name, "measure": "test_top1"}
    return [nothing | {"paper": None, "settings": ""} | claim for claim in raw["claims"]]


def _setting(results: StudyResults) -> str:
    plan = results.plan
    speeds = f"{plan['environment']['processor']}, {plan['environment']['cores']} cores"
    return (
        f"{plan['data']['name']}, {plan['data']['train']:,} training images, {plan['recipe']['epochs']} epochs, "
        f"seeds {', '.join(map(str, plan['seeds']))}, the same recipe for every arm; speeds on {speeds}"
    )


def _summary(tests: list[dict[str, Any]]) -> str:
    if not tests:
        return "not run yet"
    return ", ".join(f"{n} {verdict}" if len(tests) > 1 else verdict for verdict, n in _count(tests).items())


def _count(tests: list[dict[str, Any]]) -> Counter[str]:
    return Counter(test["verdict"] for test in tests)


def _section(claim: dict[str, Any], tests: list[dict[str, Any]]) -> list[str]:
    if not tests:
        return [f"Not run yet. It needs {claim['needs']}."]
    parts = []
    for study in dict.fromkeys(test["study"] for test in tests):
        own = [test for test in tests if test["study"] == study]
        ran = "setting" in own[0]
        where = f"../results/{study}/report.md" if ran else f"../src/convmixer/studies/{study}.yaml"
        parts.append(f"Study [{study}]({where}): {own[0]['setting'] if ran else 'not run yet'}.")
        parts.append(table(HEADS, [_row(test) for test in own]))
    return parts


def _row(test: dict[str, Any]) -> tuple[str, ...]:
    paper = test["paper"] or {}
    says = paper.get("says", "").replace(" beside ", " vs. ")  # the plans of finished studies are not edited
    theirs = f"{paper['difference']:+.2f}: {says} ({paper['source']})" if "difference" in paper else "–"
    unit = " images/s" if test["measure"] in SPEEDS and test["n"] else ""
    settings = " ".join(test["settings"].split()) or "–"
    return test["says"], difference_text(test) + unit, str(test["n"]), test["verdict"], theirs, settings


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
