"""The report, from made-up records of a study that never ran: its contents, and that nothing is left out."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from convmixer.errors import RequestError
from convmixer.records import RunRecord, append
from convmixer.results import study_plots
from convmixer.results.report import write_report
from convmixer.results.study import StudyResults
from convmixer.studies.schema import load_study

MEANS = {"depthwise": 75.0, "attention": 70.0, "token-mlp": 70.2, "linear": 68.0, "pool": 60.0, "none": 45.0}


def made_up_probe(arm: int, rounds: int) -> dict[str, Any]:
    speeds = {"train_images_per_second": 900 - 50.0 * arm, "infer_images_per_second": 3000.0 - 200 * arm}
    turns = [{key: value * (1 + turn / 100) for key, value in speeds.items()} for turn in range(rounds)]
    return speeds | {"peak_memory_bytes": 2**27, "seconds": 600 + 60.0 * arm, "rounds": turns, "device": "cpu"}


def made_up(
    folder: Path, seeds: int = 3, study: str = "mixers", unequal: bool = False, means: dict[str, float] = MEANS
) -> Path:
    """Write study.json and records.jsonl with invented numbers, marked as such."""
    parsed = load_study(study)
    arms: dict[str, Any] = {}
    for name, arm in parsed.arms.items():
        arms[name] = {
            "label": arm.label,
            "sizes": {"dim": 256} | arm.sizes,
            "solved": "dim",
            "recipe": {},
            "build": [name, {}],
        }
        arms[name] |= {
            "build": [name, {}],
            "parameters": 600_000 + 1000 * len(arms),
            "macs": 38_000_000 + 4_000_000 * len(arms),
        }
    environment = {"processor": "made up", "cores": 2, "system": "none", "versions": {"torch": "0"}, "commit": "none"}
    plan = {
        "name": study,
        "title": f"MADE UP FOR A TEST: {parsed.title}",
        "question": parsed.question,
        "notes": "Invented numbers.",
        "unequal": unequal,
        "match": {"by": "parameters", "like": next(iter(arms)), "solve": "dim"},
        "recipe": {"epochs": 10, "lr": 0.002},
        "seeds": [0, 1, 2],
        "arms": arms,
        "claims": [vars(claim) for claim in parsed.claims],
        "runs": [f"{arm}-seed{seed}" for seed in (0, 1, 2) for arm in arms],
        "data": {"name": "cifar10", "checksum": "sha256:0", "train": 50000, "val": 0, "test": 10000},
        "command": f"convmixer compare {study} cifar10",
        "environment": environment,
        "probes": {name: made_up_probe(i, seeds) for i, name in enumerate(arms)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(plan))
    draw = random.Random(0)
    for seed in range(seeds):
        for i, arm in enumerate(arms):
            top1 = means.get(arm, 60.0) + draw.uniform(-0.3, 0.3) + 0.5 * seed
            history = [{"epoch": e, "train_loss": 2 / e + i / 9 + draw.random() / 9} for e in range(1, 11)]
            results = {"arm": arm, "test_top1": top1, "seconds": 600 + 60.0 * i, "history": history}
            results["kernel_structure"] = 0.3 + 0.01 * seed if arm == "k9" else None
            record = RunRecord(f"{arm}-seed{seed}", "none", {}, {}, results, seed, environment, "2000-01-01T00:00:00")
            append(folder / "records.jsonl", record)
    return folder


def test_verdicts_follow_from_the_records(tmp_path: Path) -> None:
    found = write_report(made_up(tmp_path))
    verdicts = {claim["says"]: claim["verdict"] for claim in found["verdicts"]}
    assert list(verdicts.values()) == ["supported"] * 6
    assert found["missing"] == []
    claim = found["verdicts"][1]
    results = StudyResults(tmp_path)
    first, second = results.values("depthwise", "test_top1"), results.values("token-mlp", "test_top1")
    assert claim["difference"] == pytest.approx(sum(first[s] - second[s] for s in range(3)) / 3)
    assert claim["low"] < claim["difference"] < claim["high"]


def test_a_claim_about_a_speed_is_judged_by_the_turns_of_the_probe(tmp_path: Path) -> None:
    claim = write_report(made_up(tmp_path, study="models"))["verdicts"][-1]
    assert claim["measure"] == "infer_images_per_second"
    assert claim["difference"] == pytest.approx(-200 * 1.01)
    assert (claim["n"], claim["verdict"]) == (3, "contradicted")
    assert "2,800" in (tmp_path / "report.md").read_text()


def test_a_claim_without_a_second_arm_compares_with_random_kernels(tmp_path: Path) -> None:
    claims = write_report(made_up(tmp_path, study="kernel-size"))["verdicts"]
    claim = next(claim for claim in claims if claim["measure"] == "kernel_structure")
    assert claim["difference"] == pytest.approx(0.31)
    assert (claim["n"], claim["verdict"]) == (3, "supported")
    text = (tmp_path / "report.md").read_text()
    assert "k = 9 − random kernels (0): at least 0.1 more" in text
    assert "+0.31 (+0.29 to +0.33)" in text
    assert StudyResults(tmp_path).values("k3", "kernel_structure") == {}


def test_one_seed_decides_nothing_and_is_said_to_be_incomplete(tmp_path: Path) -> None:
    found = write_report(made_up(tmp_path, seeds=1))
    assert {claim["verdict"] for claim in found["verdicts"]} == {"not decided"}
    text = (tmp_path / "report.md").read_text()
    assert "Incomplete: 6 of 18 runs are done" in text
    assert "none-seed2" in text


@pytest.mark.parametrize("seeds", [0, 3])
def test_both_forms_say_the_same(tmp_path: Path, seeds: int) -> None:
    write_report(made_up(tmp_path, seeds, "models"))
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    plain = re.sub(r"<[^>]+>", " ", page)
    for row in re.findall(r"^\| (.+) \|$", text, re.MULTILINE):
        for cell in row.split(" | "):
            assert cell.strip().replace("\\|", "|").replace("'", "&#x27;") in plain
    assert "as reported in reviews of the paper" in text


def test_the_page_is_whole_and_asks_for_nothing(tmp_path: Path) -> None:
    write_report(made_up(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert "<!-- body -->" not in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert not re.search(r"url\((?!#)", page)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))  # pictures share one page
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', page)) <= set(ids)


@pytest.mark.parametrize("study", ["mixers", "models", "stems", "smoke"])
def test_nothing_of_a_picture_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: str) -> None:
    margins = {}

    def look(figure: Figure, name: str) -> str:
        figure.canvas.draw()
        drawn, whole = figure.get_tightbbox(), figure.bbox_inches
        margins[name] = min(drawn.x0, drawn.y0, whole.x1 - drawn.x1, whole.y1 - drawn.y1)
        return ""

    monkeypatch.setattr(study_plots, "_themed", look)
    study_plots.figures(StudyResults(made_up(tmp_path, study=study)))
    assert {"accuracy", "verdicts", "time", "train-loss"} <= set(margins)
    assert {name: margin for name, margin in margins.items() if margin < 0} == {}


def test_a_folder_without_a_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no readable study"):
        write_report(tmp_path)


def test_the_report_opens_in_a_browser_offline(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no Chromium on this machine")
    write_report(made_up(tmp_path))
    with playwright.sync_playwright() as p:
        switches = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        switches += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        browser = p.chromium.launch(executable_path=chromium, args=switches)
        for width, scheme in ((1200, "light"), (390, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            asked, wrong = [], []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("console", lambda message, wrong=wrong: wrong.append(message.text))
            page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
            page.goto((tmp_path / "report.html").as_uri())
            assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
            assert wrong == []
            boxes = page.evaluate(
                "[...document.querySelectorAll('figure svg, figure img')].map(e => e.getBoundingClientRect().height)"
            )
            assert len(boxes) >= 5
            assert min(boxes) > 60
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()


def test_a_changed_order_against_another_study_is_named_with_its_certainty(tmp_path: Path) -> None:
    here = made_up(tmp_path / "here", means=MEANS | {"attention": 76.0, "linear": 70.6})
    there = made_up(tmp_path / "there")
    found = write_report(here, there)
    said = [line for line in found["lines"] if line.startswith("order")]
    assert any(re.search(r"self-attention − depthwise convolution: \+\d.*, -\d.* is clear\.", line) for line in said)
    assert any("linear token mixing" in line and "not clear" in line for line in said)
    text = (here / "report.md").read_text()
    section = text.partition("## Against: MADE UP")[2].partition("## ")[0]
    assert re.search(r"\| self-attention \| 1 \| 76\.\d+ \| [23] \| 70\.\d+ \|", section)
    assert "<h2>Against: MADE UP" in (here / "report.html").read_text()


def test_the_same_order_is_said(tmp_path: Path) -> None:
    found = write_report(made_up(tmp_path / "here"), made_up(tmp_path / "there"))
    assert "order    The order of the arms is the same in both studies." in found["lines"]


def test_studies_on_other_data_or_without_common_arms_are_not_compared(tmp_path: Path) -> None:
    here = made_up(tmp_path / "here")
    with pytest.raises(RequestError, match="share fewer than two arms"):
        write_report(here, made_up(tmp_path / "stems", study="stems"))
    other = made_up(tmp_path / "other")
    plan = json.loads((other / "study.json").read_text())
    (other / "study.json").write_text(json.dumps(plan | {"data": plan["data"] | {"checksum": "sha256:1"}}))
    with pytest.raises(RequestError, match="other data"):
        write_report(here, other)
