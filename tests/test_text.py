"""Untrusted text is shown, never interpreted: in a terminal, a spreadsheet, a page, a Markdown reader."""

import csv
import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convmixer import text

EVIL = "\x1b]0;owned\x07[red]a\r\nb\u202e|<script>alert(1)</script>"


@given(st.text())
def test_a_terminal_gets_no_hidden_character(name: str) -> None:
    shown = text.terminal(name)
    assert shown.isprintable() or any(c.isspace() or not c.isprintable() for c in name)
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u202e\u2066\u2028" for c in shown)


def test_ordinary_names_stay_as_they_are() -> None:
    for name in ("a cat", "日本語", "café", "l'été", "-1.5", "n02106662 German shepherd, Alsatian", "שלום"):
        assert text.terminal(name) == text.csv_cell(name) == name


def test_rich_takes_no_markup() -> None:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="truecolor", width=200).print(
        text.markup(EVIL), highlight=False
    )
    assert out.getvalue() == "\\x1b]0;owned\\x07[red]a\\x0d\\x0ab\\u202e|<script>alert(1)</script>\n"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", " =", "＝"])
def test_a_spreadsheet_computes_nothing(start: str) -> None:
    name = f"{start}cmd|' /C calc'!A0"
    out = io.StringIO()
    csv.writer(out).writerow([text.csv_cell(name)])
    assert next(csv.reader(io.StringIO(out.getvalue(), newline=""))) == [f"'{name}"]


@given(st.text())
def test_html_stays_text(name: str) -> None:
    class Reader(HTMLParser):
        seen = ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.seen += f"<{tag} {attrs}>"

        def handle_data(self, data: str) -> None:
            self.seen += data

    reader = Reader()
    reader.feed(f'<p title="{text.html(name)}">{text.html(name)}</p>')
    reader.close()
    shown = text.terminal(name)
    assert reader.seen == f"<p {[('title', shown)]}>{shown}"


def test_markdown_has_no_link_image_html_or_cell() -> None:
    shown = text.markdown("a|b ![x](http://evil) <img src=x> `c` \\ **d**\n# e")
    assert shown == r"a\|b !\[x\](http://evil) \<img src=x\> \`c\` \\ \*\*d\*\*\\x0a# e"


def test_commands_show_names_of_strangers_harmlessly(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from convmixer.cli import main

    assert main(["predict", "no\x1b[2Jsuch", "x.png"]) == 2
    assert "\x1b" not in "".join(capfd.readouterr())
