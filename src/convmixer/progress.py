"""A progress bar for loops that take long. It is drawn only on a terminal."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], text: str, total: int, shown_from: int = 8) -> Iterable[T]:
    """Return the items, drawing a bar while they are consumed.

    Args:
        items: The items of the loop.
        text: Label of the bar, e.g. "evaluating".
        total: Number of items.
        shown_from: With fewer items no bar is drawn.
    """
    from rich.console import Console
    from rich.progress import track as bar

    console = Console(stderr=True)
    if total < shown_from or not console.is_terminal:
        return items
    return bar(items, text, total, console=console, transient=True)
