"""Writes a study's report: one self-contained HTML file, and the same contents as Markdown."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from convmixer.files import write_atomic
from convmixer.results.order import order_sentences, order_table
from convmixer.results.page import embedded, figure, html_page, html_table
from convmixer.results.statistics import CONTRADICTED, SUPPORTED
from convmixer.results.study import SPEEDS, ArmRow, StudyResults
from convmixer.results.study_plots import UNITS, figures, standalone
from convmixer.run_folder import StudyFolder
from convmixer.text import html as escape_html
from convmixer.text import markdown as markdown_text
from convmixer.text import plain_value

SIGNS = {SUPPORTED: "✔", CONTRADICTED: "✘"}
RELATIONS = {
    "better": "at least {m} more",
    "at-least": "less than {m} worse",
    "same": "less than {m} apart",
}
CHOSEN = "●"
HEADS = ("arm", "test top-1 %", "n", "parameters", "MACs", "train images/s", "infer images/s", "time", "memory")
HOW = (
    "± is half the 95% t interval over the seeds. A claim is about the difference first − second, paired over seeds "
    "(a speed: over rounds of measurement); it is supported if the whole 95% interval agrees with it, contradicted "
    "if the whole interval disagrees, else not decided with this many pairs. Claims, directions and the smallest "
    "differences that matter stood in the study file before it ran; the intervals are not corrected for the number "
    "of claims. Before the runs, a few steps of each arm were measured in a fresh process, one arm after the other "
    "on one machine: this gives the speeds (the table has the median of the rounds), and the memory without "
    "libraries and data; time is that of a run at this speed. The runs themselves may have shared machines."
)


def write_report(folder: Path, against: Path | None = None) -> dict[str, Any]:
    """Write report.html, report.md and the pictures of a study folder from its plan and records.

    Args:
        folder: The study folder, with its plan and records.
        against: Another study's folder; the report then compares the order of the arms that both share.

    Returns:
        `report` (the HTML file), `verdicts`, `missing` (run names), and `lines` to print.

    Raises:
        ValueError: A folder holds no study.
        RequestError: The other study shares no arms with this one.
    """
    results = StudyResults(folder)
    other = StudyResults(against) if against else None
    pictures = figures(results)
    for name, (_, svg) in pictures.items():
        write_atomic(StudyFolder(folder).pictures / f"{name}.svg", standalone(svg).encode())
    write_atomic(folder / "report.md", markdown(results, pictures, other).encode())
    path = folder / "report.html"
    write_atomic(path, page(results, pictures, other).encode())
    return {
        "report": path,
        "verdicts": results.verdicts(),
        "missing": results.missing,
        "lines": _lines(results, other),
    }


def _lines(results: StudyResults, other: StudyResults | None) -> list[str]:
    """Return the lines for the terminal: arms from the best to the worst, then the verdicts."""
    rows = sorted((row for row in results.rows() if row.test), key=lambda row: -row.test.mean if row.test else 0)
    arms = [
        f"arm      {row.label:<32} {_accuracy(row):>15} % test top-1, n = {row.test.n}" for row in rows if row.test
    ]
    claims = [f"claim    {c['says']}: {c['verdict']}, {difference_text(c)}, n = {c['n']}" for c in results.verdicts()]
    missing = [f"missing  {', '.join(results.missing)}"] if results.missing else []
    order = [f"order    {sentence}" for sentence in order_sentences(results, other)] if other else []
    return arms + claims + order + missing


def markdown(results: StudyResults, pictures: dict[str, tuple[str, str]], other: StudyResults | None = None) -> str:
    """Return the report as Markdown; pictures are links into `pictures/`."""
    plan, parts = results.plan, []
    parts += [f"# {plan['title']}", plan["question"]]
    parts += [f"> **{markdown_text(line)}**" for line in _warnings(results)]
    parts += ["## Claims and verdicts", table(CLAIM_HEADS, _claim_cells(results)), _paper_list(results)]
    parts += ["## Arms", table(HEADS, [_cells(row) for row in results.rows()]), HOW]
    if other:
        parts += [f"## Against: {other.plan['title']}", table(*order_table(results, other))]
        parts += order_sentences(results, other)
    if results.tune:
        parts += ["## Tuning", tuning_sentence(results.tune), table(*tuning_table(results))]
    parts += [f"![{title}](pictures/{name}.svg)" for name, (title, _) in pictures.items()]
    parts += ["## What was done", plan["notes"], _sizes_sentence(results), "```\n" + _commands(results) + "\n```"]
    parts += [table(("", ""), _facts(results)), "### Shared recipe", table(("setting", "value"), _recipe(plan))]
    drawn = [(title, path) for title, path in _weight_pictures(results)]
    parts += ["## Filters and kernels"] if drawn else []
    parts += [f"![{title}]({os.path.relpath(path, results.folder)})" for title, path in drawn]
    return "\n\n".join(part for part in parts if part) + "\n"


def page(results: StudyResults, pictures: dict[str, tuple[str, str]], other: StudyResults | None = None) -> str:
    """Return the report as one HTML page; style and pictures are inside it."""
    plan = results.plan
    warnings = "".join(f'<p class="warning">{escape_html(line)}</p>' for line in _warnings(results))
    charts = "".join(figure(title, svg) for title, svg in pictures.values())
    weights = "".join(figure(title, embedded(path, title)) for title, path in _weight_pictures(results))
    body = f"""
<header><h1>{escape_html(plan["title"])}</h1><p class="lead">{escape_html(plan["question"])}</p>{warnings}</header>
<section><h2>Claims and verdicts</h2>{html_table(CLAIM_HEADS, _claim_cells(results), "claims")}
{_paper_html(results)}</section>
<section><h2>Arms</h2>{html_table(HEADS, [_cells(row) for row in results.rows()], "arms")}
<p class="small">{escape_html(HOW)}</p></section>
{_order_html(results, other)}{_tuning_html(results)}
<section><h2>Pictures</h2><div class="grid">{charts or "<p>No run has ended yet.</p>"}</div></section>
{f'<section><h2>Filters and kernels</h2><div class="grid">{weights}</div></section>' if weights else ""}
<section><h2>What was done</h2><p>{escape_html(plan["notes"])}</p><p>{escape_html(_sizes_sentence(results))}</p>
<pre>{_commands_html(results)}</pre>{html_table(("", ""), _facts(results), "facts")}
<details><summary>Shared recipe, every setting</summary>{html_table(("setting", "value"), _recipe(plan), "facts")}
</details></section>"""
    return html_page(plan["title"], body)


CLAIM_HEADS = ("claim", "counts if", "difference (95% interval)", "pairs", "verdict", "paper")


def _warnings(results: StudyResults) -> list[str]:
    plan, lines = results.plan, []
    if plan["unequal"]:
        arms = plan["arms"].values()
        own = [f"{a['label']} ({_changes(a['recipe'])})" for a in arms if a["recipe"]]
        lines.append(f"Unequal: not all arms share one recipe. Different: {'; '.join(own) or 'none after all'}.")
    if results.missing:
        total = len(plan["runs"]) + len(results.tune["runs"] if results.tune else ())
        done = total - len(results.missing)
        lines.append(f"Incomplete: {done} of {total} runs are done. Missing: {', '.join(results.missing)}.")
    lines += [f"Failed: {run}: {error}" for run, error in results.failures.items()]
    return lines


def _changes(recipe: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {plain_value(c['here'])} instead of {plain_value(c['shared'])}" for key, c in recipe.items()
    )


def _claim_cells(results: StudyResults) -> list[Sequence[str]]:
    return [
        (
            claim["says"],
            _rule(results, claim),
            difference_text(claim),
            str(claim["n"]),
            f"{SIGNS.get(claim['verdict'], '–')} {claim['verdict']}",
            _paper_number(claim),
        )
        for claim in results.verdicts()
    ]


def _rule(results: StudyResults, claim: dict[str, Any]) -> str:
    arms, unit = results.plan["arms"], UNITS[claim["measure"]]
    rule = RELATIONS[claim["relation"]].format(m=f"{claim['matters']:g}")
    second = arms[claim["second"]]["label"] if claim["second"] else "random kernels (0)"
    return f"{arms[claim['first']]['label']} − {second}: {rule} ({unit})"


def difference_text(claim: dict[str, Any]) -> str:
    """Return the difference of a judged claim with its interval, as tables show it."""
    if claim["difference"] is None:
        return "not measured"
    digits = 0 if claim["measure"] in SPEEDS else 2
    text = f"{claim['difference']:+.{digits}f}"
    if claim["low"] is None:
        return f"{text} (no interval from one pair)"
    return f"{text} ({claim['low']:+.{digits}f} to {claim['high']:+.{digits}f})"


def _paper_number(claim: dict[str, Any]) -> str:
    paper = claim["paper"]
    if not paper:
        return "–"
    return f"{paper['difference']:+.2f}" if "difference" in paper else "see below"


def _paper_notes(results: StudyResults) -> list[tuple[str, str]]:
    notes = []
    for claim in results.plan["claims"]:
        if claim["paper"]:
            paper = claim["paper"]
            text = f"{paper['says']} ({paper['source']}). {claim['settings'].strip()}"
            notes.append((claim["says"], text.strip()))
    return notes


def _paper_list(results: StudyResults) -> str:
    lines = [f"- {claim}: {text}" for claim, text in _paper_notes(results)]
    return "\n".join(["The paper's own numbers, and how its settings differ:", "", *lines]) if lines else ""


def _paper_html(results: StudyResults) -> str:
    items = "".join(f"<li><b>{escape_html(c)}</b>: {escape_html(t)}</li>" for c, t in _paper_notes(results))
    return f"<h3>The paper's own numbers, and how its settings differ</h3><ul>{items}</ul>" if items else ""


def _cells(row: ArmRow) -> Sequence[str]:
    return (
        row.label,
        _accuracy(row),
        str(row.test.n if row.test else 0),
        f"{row.parameters:,}",
        f"{row.macs / 1e6:,.1f} M",
        f"{row.train_speed:,.0f}",
        f"{row.infer_speed:,.0f}",
        f"{row.seconds:,.0f} s",
        f"{row.memory / 2**20:,.0f} MiB",
    )


def _accuracy(row: ArmRow) -> str:
    if row.test is None:
        return "–"
    return f"{row.test.mean:.2f}" + (f" ± {row.test.half_width:.2f}" if row.test.n > 1 else "")


def tuning_sentence(tune: dict[str, Any]) -> str:
    """Return in words what every arm tried, from the plan's `tune`."""
    epochs = tune["epochs"]
    length = f" of {epochs} epoch{'s' if epochs > 1 else ''}" if epochs else ""
    return (
        f"Every arm got {tune['trials']} trials{length} with the same values, each judged on "
        f"{tune['val_fraction']:.0%} of the training images, held out of its training. The settings of the best "
        f"trial ({CHOSEN}) then trained the arm's seeds. No trial read the test set."
    )


def tuning_table(results: StudyResults) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Return heads and rows: a trial, its settings, and each arm's validation accuracy with the chosen one marked."""
    tune, arms = results.tune or {}, results.plan["arms"]
    names = list(tune["settings"])
    tried = {arm: results.tried(arm) for arm in arms}
    chosen = {arm: results.chosen(arm) for arm in arms}

    def cell(arm: str, trial: int) -> str:
        if trial not in tried[arm]:
            return "–"
        value, mark = tried[arm][trial], f" {CHOSEN}" if chosen[arm] == trial else ""
        return "diverged" if value is None else f"{value:.2f}{mark}"

    rows: list[Sequence[str]] = [
        (
            str(i),
            *(_value(values.get(name, results.plan["recipe"][name])) for name in names),
            *(cell(arm, i) for arm in arms),
        )
        for i, values in enumerate(tune["proposals"])
    ]
    return ("trial", *names, *(f"{arm['label']}, val top-1 %" for arm in arms.values())), rows


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else plain_value(value)


def _order_html(results: StudyResults, other: StudyResults | None) -> str:
    if other is None:
        return ""
    said = "".join(f"<p>{escape_html(sentence)}</p>" for sentence in order_sentences(results, other))
    title = escape_html(other.plan["title"])
    return f"<section><h2>Against: {title}</h2>{html_table(*order_table(results, other), 'arms')}{said}</section>"


def _tuning_html(results: StudyResults) -> str:
    if not results.tune:
        return ""
    text = escape_html(tuning_sentence(results.tune))
    return f"<section><h2>Tuning</h2><p>{text}</p>{html_table(*tuning_table(results), 'arms')}</section>"


def _sizes_sentence(results: StudyResults) -> str:
    match, arms = results.plan["match"], results.plan["arms"]
    sizes = "; ".join(f"{arm['label']}: {_size(arm['sizes'])}" for arm in arms.values())
    if not match:
        return f"Sizes are as written in the study, nothing was matched. {sizes}."
    like = arms[match["like"]]["label"]
    how = f"{match['solve']} of each arm was chosen so that it has about as many {match['by']} as {like}"
    others = [a for n, a in arms.items() if not a["solved"] and n != match["like"]]
    fixed = [f"{a['label']} ({a[match['by']]:,})" for a in others]
    return f"{how}{'; exceptions: ' + ', '.join(fixed) if fixed else ''}. {sizes}."


def _commands(results: StudyResults) -> str:
    """Return the command that planned the study and those that trained its runs, a line each."""
    own = [results.plan["command"], *(record.command for record in results.records.values())]
    return "\n".join(dict.fromkeys(own))


def _commands_html(results: StudyResults) -> str:
    return "\n".join(map(escape_html, _commands(results).split("\n")))


def _size(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sizes.items())


def _facts(results: StudyResults) -> list[Sequence[str]]:
    plan = results.plan
    data, probed, probes = plan["data"], plan["environment"], plan["probes"]
    selection = "none: the last epoch of each run" if not data["val"] else "the best epoch on the validation split"
    environments = [record.environment for record in results.records.values()] or [plan["environment"]]
    dates = sorted(record.date for record in results.records.values())
    facts: list[Sequence[str]] = [
        ("data", f"{data['name']}, {data['train']} train, {data['val']} val, {data['test']} test images"),
        ("data checksum", str(data["checksum"])),
        ("selection", f"{selection}; the test split was read once per run"),
        ("seeds", ", ".join(map(str, plan["seeds"]))),
        ("runs", f"{len(results.records)} of {len(plan['runs'])}"),
        ("trained on", _each(_machine(e) for e in environments)),
        ("speeds of", f"{_machine(probed)}, torch {probed['versions']['torch']}: {_computed_with(results, probes)}"),
        ("versions", _each(", ".join(f"{k} {v}" for k, v in e["versions"].items()) for e in environments)),
        ("commit", _each(str(e["commit"]) for e in environments)),
    ]
    if dates:
        by_run = {run: record.results for run, record in results.records.items()}
        facts += [("computed with", _computed_with(results, by_run)), ("dates", f"{dates[0]} to {dates[-1]}")]
    reused = {run: r.results["reused_from"] for run, r in results.records.items() if "reused_from" in r.results}
    if reused:
        where = "; ".join(f"{run} is {source}" for run, source in reused.items())
        facts.append(("trained elsewhere", where))
    return facts


def _machine(environment: dict[str, Any]) -> str:
    gpus = [f"{name}, " for name in environment.get("gpus", ())]
    return f"{''.join(gpus)}{environment['processor']}, {environment['cores']} cores, {environment['system']}"


def _each(texts: Iterable[str]) -> str:
    return "; ".join(sorted(set(texts)))


def _computed_with(results: StudyResults, measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Return precision, device, threads and kernels of runs or probes; if they differ, with the arms of each."""
    ways: dict[str, set[str]] = {}
    for name, r in measured.items():
        way = ", ".join(f"{key} {r[key]}" for key in ("precision", "device", "threads", "kernels") if key in r)
        ways.setdefault(way, set()).add(results.plan["arms"][r.get("arm", name)]["label"])
    if len(ways) == 1:
        return next(iter(ways))
    return "; ".join(f"{way}: {', '.join(sorted(arms))}" for way, arms in sorted(ways.items()))


def _recipe(plan: dict[str, Any]) -> list[Sequence[str]]:
    skip = ("seed", "model", "act", "drop_rate")  # not the recipe's, see schema.py
    return [(key, plain_value(value)) for key, value in plan["recipe"].items() if key not in skip]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(markdown_text(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _weight_pictures(results: StudyResults) -> list[tuple[str, Path]]:
    kinds = {"filters": "filters of the first convolution", "kernels": "depthwise kernels by layer"}
    seed = results.plan["seeds"][0]
    found = []
    for name, arm in results.plan["arms"].items():
        folder, there = results.weights_of(name, seed) or (results.folder, name)
        for kind, what in kinds.items():
            if (path := StudyFolder(folder).pictures / f"{there}-{kind}.png").exists():
                found.append((f"{arm['label']}, seed {seed}: {what}", path))
    return found
