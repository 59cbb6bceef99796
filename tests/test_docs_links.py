"""Every link in the project's pages has a target, and every path they name exists."""

import re
from pathlib import Path

import pytest

from docs_pages import PAGES, ROOT, anchors, links, tokens

IN_PROJECT = r"(src|tests|tools|docs|results|benchmarks)/[\w/.-]+"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), f"{page}: {link}"
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page}: {link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{page}: {link} leaves the project"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link}: {sorted(anchors(target))}"


def test_files_named_in_the_text_exist() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        if page.name == "log.md":  # tells what was
            continue
        for token in tokens(page):
            for part in token.children or ():
                if part.type == "code_inline" and re.fullmatch(
                    r"(src|tests|tools|docs|results|benchmarks)/[\w/.-]+", part.content
                ):
                    assert (ROOT / part.content).exists(), f"{page}: {part.content}"


def test_rooms_named_by_the_architecture_exist() -> None:
    package = ROOT / "src" / "convmixer"
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("## The rooms") : text.index("## What happens to an image")]
    named = re.findall(
        r"`([\w/.]+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    )
    assert not [name for name in named if not (package / name).exists()]
    rooms = {path.name for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    silent = {"__init__.py", "__main__.py", "_version.py"}
    assert {name.rstrip("/") for name in named if name.count("/") < 2} >= rooms - silent, "say what each room is for"


def test_files_of_the_table_of_changes_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("## Where to add what") :]
    for name in re.findall(r"`([\w/]+\.(?:py|yaml)|[\w/]+/)`", table):
        assert (ROOT / "src" / "convmixer" / name).exists() or (ROOT / name).exists(), name
