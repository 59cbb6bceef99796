"""Reads the project's pages for the tests of the docs: links, headings and shell blocks."""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "results").glob("*/*.md")),
    *sorted((ROOT / "src/convmixer/pretrained").glob("*/README.md")),
]


@dataclass(frozen=True)
class Command:
    """A line of a shell block, without its comment.

    Args:
        text: The line's text.
        where: Page and line, for messages.
    """

    text: str
    where: str


def tokens(page: Path) -> list[Token]:
    """Return the page's block tokens."""
    return MarkdownIt("gfm-like", {"linkify": False}).parse(page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """Return the targets of all links and pictures of a page, HTML ones too."""
    found = []
    for token in tokens(page):
        for part in (token, *(token.children or ())):
            found += [str(value) for key, value in part.attrs.items() if key in ("href", "src")]
            if part.type in ("html_block", "html_inline"):
                found += re.findall(r'(?:src|href|srcset)="([^"]+)"', part.content)
    return found


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    blocks = tokens(page)
    return {_slug(blocks[i + 1].content) for i, token in enumerate(blocks) if token.type == "heading_open"}


def commands(page: Path) -> list[Command]:
    """Return the lines of the page's `sh` blocks."""
    found = []
    for token in tokens(page):
        if token.type == "fence" and token.info == "sh":
            assert token.map
            for number, line in enumerate(token.content.splitlines(), token.map[0] + 2):
                if text := re.sub(r"\s+#.*", "", line).strip():
                    found.append(Command(text, f"{page.relative_to(ROOT)}:{number}"))
    return found


def unmarked(page: Path) -> list[str]:
    """Return what looks like a command in blocks that are not marked `sh`, which no test would run."""
    looks = re.compile(r"^\s*(convmixer|make|pip|python|torchrun|curl) ", re.MULTILINE)
    return [
        token.content
        for token in tokens(page)
        if token.type in ("fence", "code_block") and token.info != "sh" and looks.search(token.content)
    ]


def inline(page: Path) -> list[str]:
    """Return the `convmixer ...` commands in the page's text."""
    return [
        part.content
        for token in tokens(page)
        for part in token.children or ()
        if part.type == "code_inline" and part.content.startswith("convmixer ")
    ]


def _slug(heading: str) -> str:
    text = re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", heading).lower()
    kept = (c for c in text if c in "- _" or unicodedata.category(c)[0] in "LN")
    return "".join(kept).replace(" ", "-")
