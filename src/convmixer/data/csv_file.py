"""A text table as people save it: UTF-8 or UTF-16, commas, semicolons, tabs or bars, with a header or without."""

import codecs
import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from convmixer.errors import RequestError

DELIMITERS = ",;\t|"
PROBED_LINES = 50


@dataclass(frozen=True)
class Rows:
    """A table of text.

    Args:
        path: The file.
        names: Names of the columns; "column 1", ... if it has no header.
        lines: Line number of each row.
        cells: The rows, each with as many cells as there are names.
        has_header: Whether the names are from the file.
    """

    path: Path
    names: list[str]
    lines: list[int]
    cells: list[list[str]]
    has_header: bool

    def column(self, number: int) -> list[str]:
        """Return the cells of a column."""
        return [row[number] for row in self.cells]


def read_csv(path: Path, known: Iterable[str], is_data: Callable[[str], bool]) -> Rows:
    """Return the rows of a table.

    Args:
        path: A .csv or .tsv file.
        known: Names in lower case that are found only in a header.
        is_data: Cell -> whether it can only be data, because it is the path of an image.

    Raises:
        RequestError: The file is not text, or a row has more cells than the first.
    """
    text = _decode(path)
    known = set(known)
    rows = _split(text, path, known)
    if not rows:
        raise RequestError(f"{path} names no images: expected lines of path,label")
    first = rows[0][1]
    width = len(first)
    tidy = [normal(cell) for cell in first]
    has_header = not any(is_data(cell) for cell in first) and (len(rows) > 1 or bool(known & set(tidy)))
    has_header = has_header and (bool(known & set(tidy)) or not _is_repeated(first, rows[1:]))
    for line, cells in rows:
        if len(cells) > width and any(cells[width:]):
            raise RequestError(f"{path} line {line}: {len(cells)} cells, the first line has {width}")
        cells[width:] = []
        cells += [""] * (width - len(cells))
    names = [cell if has_header and cell else f"column {i + 1}" for i, cell in enumerate(first)]
    body = rows[1:] if has_header else rows
    return Rows(path, names, [line for line, _ in body], [cells for _, cells in body], has_header)


def _is_repeated(first: Sequence[str], rows: Sequence[tuple[int, list[str]]]) -> bool:
    """Return whether a text of the first row occurs below it; if so, the first row is data and not a header.

    With three columns or more, numbers do not count, because columns of zeros and ones may be named 0 and 1.
    """
    texts = {n: cell for n, cell in enumerate(first) if cell and (len(first) == 2 or not cell.isdigit())}
    return any(cells[n : n + 1] == [cell] for n, cell in texts.items() for _, cells in rows)


def normal(name: str) -> str:
    """Return the name of a column in lower case with "_" between words."""
    return "_".join(name.strip().lower().replace("-", " ").replace("_", " ").split())


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RequestError(f"{path} line {line} is not UTF-8: save the table as CSV UTF-8") from error


def _split(text: str, path: Path, known: set[str]) -> list[tuple[int, list[str]]]:
    """Return line numbers and cells of the rows that hold something."""
    start = text.split("\n", 1)[0].strip()
    skipped = 0
    if start.lower().startswith("sep=") and len(start) == 5:  # Excel names the delimiter in this way
        text, delimiter, skipped = text.split("\n", 1)[-1] if "\n" in text else "", start[-1], 1
    else:
        delimiter = _delimiter(text, known) if path.suffix.lower() != ".tsv" else "\t"
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        stripped = ((reader.line_num + skipped, [cell.strip() for cell in row]) for row in reader)
        return [(line, cells) for line, cells in stripped if any(cells)]
    except csv.Error as error:
        raise RequestError(f"cannot read {path}: {error}") from error


def _delimiter(text: str, known: set[str]) -> str:
    """Return the delimiter that gives all rows the same number of cells; if several do, one with a known header."""
    regular = {}
    for delimiter in DELIMITERS:
        rows = _probe(text, delimiter)
        if len({len(row) for row in rows}) == 1 and len(rows[0]) > 1:
            regular[delimiter] = len(known & {normal(cell) for cell in rows[0]})
    return max(regular, key=regular.__getitem__) if regular else ","


def _probe(text: str, delimiter: str) -> Sequence[Sequence[str]]:
    lines = text.splitlines()[:PROBED_LINES]
    try:
        return [row for row in csv.reader(lines, delimiter=delimiter) if any(row)]
    except csv.Error:
        return []
