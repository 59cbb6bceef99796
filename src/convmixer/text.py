"""Untrusted text (class names, file names, errors that quote them), escaped before it is shown.

There is one function for each kind of output: terminal, rich, CSV, HTML, Markdown. Apply it once, when text is
    written.
Inside the program and in JSON, names stay as they are.
"""

import html as _html
import json
import re

# Control characters, changes of writing direction, line separators, lone surrogates: these move the cursor, hide what
# follows, or make one line look like two.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_FORMULA = re.compile("[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~&$]|^[#+-](?=[\s#-]|$))")


def terminal(text: object) -> str:
    """Return text as one line, in which each hidden character is replaced by its code, such as \\x1b."""
    return _HIDDEN.sub(lambda found: _code(found[0]), str(text))


def markup(text: object) -> str:
    """Return text for rich's console and tables: like `terminal`, and with rich's markup escaped."""
    from rich.markup import escape

    return escape(terminal(text))


def csv_cell(text: object) -> str:
    """Return text for a cell of a CSV file; text that a spreadsheet takes for a formula gets an apostrophe first."""
    value = str(text)
    formula = _FORMULA.match(value.lstrip(" ")) and not _NUMBER.fullmatch(value)
    return f"'{value}" if formula else value


def html(text: object) -> str:
    """Return text for HTML, in an element or in a quoted attribute."""
    return _html.escape(terminal(text))


def markdown(text: object) -> str:
    """Return text for Markdown, also in tables; markup, links and HTML in it are escaped."""
    return _MARKDOWN.sub(r"\\\1", terminal(text))


def _code(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def plain_value(value: object) -> str:
    """Return the value of a setting as a user writes it, without quotes; None becomes "none"."""
    return "none" if value is None else json.dumps(value).strip('"')


def duration(seconds: float, digits: int = 0) -> str:
    """Return a time in a fitting unit: "90 s" (with `digits` decimals), "45 min", "2.5 h"."""
    if seconds < 120:
        return f"{seconds:.{digits}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def shortened(text: object, most: int) -> str:
    """Return text with at most `most` characters; the middle is left out, because names often end in a number."""
    value = str(text)
    tail = max(4, most // 3)
    return value if len(value) <= most else f"{value[: most - tail - 1]}…{value[-tail:]}"
