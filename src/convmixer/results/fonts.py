"""Fonts for names in any script: installed fonts are used for characters that matplotlib's font lacks."""

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib import font_manager, ft2font

from convmixer.text import shortened

OWN = "DejaVu Sans"  # ships with matplotlib
MOST_FILES = 2000  # most font files to search: some machines have tens of thousands
_said: set[str] = set()


@contextlib.contextmanager
def drawing(style: dict[Any, Any], texts: Iterable[str] = ()) -> Iterator[None]:
    """Draw with a style and with fonts that have the characters of the texts; a line says once if no font has them.

    Args:
        style: Matplotlib settings.
        texts: Names in the picture.
    """
    families, missing = families_for("".join(texts))
    _say_once(missing)
    plain = {"font.family": families, "text.parse_math": False}  # a $ in a name is no formula
    with plt.rc_context(style | plain), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from font", category=UserWarning)
        yield


def _say_once(missing: str) -> None:
    if missing and missing not in _said:
        _said.add(missing)
        print(
            f"note     no font here draws {missing[:20]}, so pictures show boxes: install one, such as Noto Sans CJK"
        )


def as_drawn(text: str, most: int = 14) -> str:
    """Return a name as `drawing` draws it: shortened, and without bytes that are not valid text."""
    return shortened(text.encode(errors="replace").decode(), most)


def told_apart(names: Sequence[str], most: int = 14) -> list[str]:
    """Return names as they are drawn; names that would look alike begin with their position in the list."""
    drawn = [as_drawn(name, most) for name in names]
    seen = Counter(drawn)
    return [
        short if seen[short] == 1 else as_drawn(f"{place} {name}", most)
        for place, (short, name) in enumerate(zip(drawn, names, strict=True))
    ]


def families_for(text: str) -> tuple[list[str], str]:
    """Return font families that together have the characters of a text, and the characters that no font has."""
    wanted = {ord(c) for c in text if c.isprintable() and not c.isspace()} - _holds(font_manager.findfont(OWN))
    families = [OWN]
    for name, path in _installed() if wanted else ():
        found = wanted & _holds(path)
        if found:
            families.append(name)
            wanted -= found
        if not wanted:
            break
    return families, "".join(map(chr, sorted(wanted)))


@functools.cache
def _installed() -> list[tuple[str, str]]:
    """Return (family, file) of the upright, regular fonts; fonts for many scripts come first."""
    known = {font.fname for font in font_manager.fontManager.ttflist}
    for path in set(font_manager.findSystemFonts()[:MOST_FILES]) - known:  # installed after matplotlib made its list
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            font_manager.fontManager.addfont(path)
    regular = {
        font.name: font.fname
        for font in font_manager.fontManager.ttflist
        if font.style == "normal" and font.weight in (400, "normal", "regular") and "Last Resort" not in font.name
    }
    broad = ("CJK", "Noto Sans", "Unicode", "Fallback", "Gothic", "Hei", "Hiragino")
    names = sorted(regular, key=lambda name: (not any(word in name for word in broad), name))
    return [(name, regular[name]) for name in names[:MOST_FILES]]


@functools.lru_cache(maxsize=64)
def _holds(path: str) -> frozenset[int]:
    """Return the code points that a font file can draw."""
    try:
        return frozenset(ft2font.FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def font_file(text: str, say: bool = True) -> str:
    """Return the file of the font that has most characters of a text; matplotlib's own if it has all.

    Args:
        text: The text.
        say: Print a line, once, if the font lacks some characters.
    """
    wanted = {ord(c) for c in text if c.isprintable() and not c.isspace()}
    own = font_manager.findfont(OWN)
    if wanted <= _holds(own):
        return own
    files = [path for _, path in _installed()]
    best = max([own, *files], key=lambda path: len(wanted & _holds(path)))
    if say:
        _say_once("".join(map(chr, sorted(wanted - _holds(best)))))
    return best
