"""Untrusted text (class names, file names, errors that quote them), escaped before it is shown.

One function for each place: terminal, rich, CSV, HTML, Markdown. Apply it once, where text goes out;
names are kept as they are inside the program and in JSON.
"""

import html as _html
import json
import re

# Control characters, changes of writing direction, line separators, lone surrogates: they move the cursor, hide what
# follows, or make one line look like two.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_FORMULA = re.compile("[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~&$]|^[#+-](?=[\s#-]|$))")


def terminal(text: object) -> str:
    """Return text in one line with each hidden character as its code, such as \\x1b."""
    return _HIDDEN.sub(lambda found: _code(found[0]), str(text))


def markup(text: object) -> str:
    """Return text for rich's console and tables: as `terminal`, and with no markup in it."""
    from rich.markup import escape

    return escape(terminal(text))


def csv_cell(text: object) -> str:
    """Return text for a cell of a CSV file. What a spreadsheet would take for a formula gets an apostrophe."""
    value = str(text)
    formula = _FORMULA.match(value.lstrip(" ")) and not _NUMBER.fullmatch(value)
    return f"'{value}" if formula else value


def html(text: object) -> str:
    """Return text for HTML, in an element or in a quoted attribute."""
    return _html.escape(terminal(text))


def markdown(text: object) -> str:
    """Return text for Markdown, also in a table: no markup, no link, no HTML."""
    return _MARKDOWN.sub(r"\\\1", terminal(text))


def _code(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def plain_value(value: object) -> str:
    """Return the value of a setting as one writes it, without quotes; none for None."""
    return "none" if value is None else json.dumps(value).strip('"')


def duration(seconds: float, digits: int = 0) -> str:
    """Return a time in its largest fitting unit, in seconds with that many decimals: "90 s", "45 min", "2.5 h"."""
    if seconds < 120:
        return f"{seconds:.{digits}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def shortened(text: object, most: int) -> str:
    """Return text with at most `most` characters, leaving out the middle: names often end in a number."""
    value = str(text)
    tail = max(4, most // 3)
    return value if len(value) <= most else f"{value[: most - tail - 1]}…{value[-tail:]}"
