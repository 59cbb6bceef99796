"""Studies that take minutes: the shipped one in a browser, checkpoints, unequal recipes, workers on PostgreSQL."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from convmixer.studies.run import compare
from study_runs import kill_in_the_middle, numbers, start, tiny

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
pytestmark = pytest.mark.slow


def test_smoke_takes_at_most_three_minutes_and_opens_in_a_browser(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no Chromium on this machine")
    began = time.monotonic()
    said = subprocess.run(
        [sys.executable, "-m", "convmixer", "compare", "smoke", "--out", str(tmp_path / "out"), "--json"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    seconds = time.monotonic() - began
    result = json.loads(said.splitlines()[-1])
    assert result["missing"] == result["failed"] == []
    assert seconds < 180 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # others may use this machine too
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page, asked = browser.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(Path(result["report"]).resolve().as_uri())
        assert not [url for url in asked if not url.startswith(("file:", "data:"))]
        drawn = page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert drawn
        assert page.locator("figure svg").count() >= 5
        assert page.locator("figure img").count() >= 1
        browser.close()


def test_a_killed_run_continues_from_its_checkpoint(whole: Path, tmp_path: Path) -> None:
    study, out = tiny(tmp_path), tmp_path / "out"
    worker, deadline = start(study, out), time.monotonic() + 600
    while not list(out.glob("runs/depthwise-seed0/checkpoints/latest.pt")):
        assert worker.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(worker.pid, signal.SIGKILL)
    worker.communicate()
    said = start(study, out, "--resume").finish()
    assert re.search(r"resuming .*depthwise-seed0 at step (?!0 )\d+", said)
    assert numbers(out) == numbers(whole)


def test_an_unequal_study_says_so_on_top(tmp_path: Path) -> None:
    raw = yaml.safe_load(tiny(tmp_path).read_text())
    raw["arms"]["none"]["recipe"] = {"lr": 0.001}
    found = compare(str(tiny(tmp_path, unequal=True, arms=raw["arms"])), "digits", tmp_path / "out", budget="1s")
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.index("Unequal: not all arms share one recipe") < text.index("## Claims")
    assert "no mixing (lr 0.001 instead of 0.02)" in Path(found["report"]).read_text()


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real PostgreSQL on loopback; it refuses to run as root, so it runs as `postgres` then."""
    if not POSTGRES:
        pytest.skip("PostgreSQL is not installed: no /usr/lib/postgresql/*/bin")
    pytest.importorskip("psycopg2", reason="the extra `postgres` is not installed")
    binaries, folder = POSTGRES[-1], Path("/tmp") / f"convmixer-postgres-{os.getpid()}"
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    port = 20000 + os.getpid() % 20000

    def run(*words: str) -> None:
        subprocess.run([*as_user, *words], check=True, cwd="/", stdout=subprocess.DEVNULL, timeout=60)

    options = f"-p {port} -h 127.0.0.1 -k {folder}"
    try:
        run(str(binaries / "initdb"), "-D", str(folder), "-U", "study", "-A", "trust", "--no-sync")
        run(str(binaries / "pg_ctl"), "-D", str(folder), "-o", options, "-l", f"{folder}/log", "-w", "start")
        yield f"postgresql://study@127.0.0.1:{port}/postgres"
    finally:
        run(str(binaries / "pg_ctl"), "-D", str(folder), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def test_two_workers_on_postgresql_one_of_them_killed(whole: Path, tmp_path: Path, postgres: str) -> None:
    study, out = tiny(tmp_path), tmp_path / "out"
    queue = ("--storage", postgres, "--heartbeat", "1")
    first = start(study, out, *queue)
    deadline = time.monotonic() + 600
    while not (out / "study.json").exists():  # planned and queued
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    second = start(study, out, *queue, "--worker")
    kill_in_the_middle(second, r"epoch 1/2")
    said = first.finish()
    assert numbers(out) == numbers(whole)
    trained = [line for line in said.splitlines() if line.startswith("run  ")]
    assert len(trained) == len(set(trained))
    assert "report " in said
