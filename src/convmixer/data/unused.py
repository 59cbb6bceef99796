"""Counts the parts of a data set that are not used, by reason, so that nothing is left out silently."""

from collections import Counter
from typing import Any

KEPT = 1000  # names kept for each reason
NO_IMAGE = "no image"  # a reason that several readers use
SHOWN = 5  # names in a note


class Unused:
    """Files, folders, columns and members of a data set that are not used, by reason.

    Attributes:
        counts: Reason -> number of parts.
        names: Reason -> names of the first 1,000 parts.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, *names: str) -> None:
        """Count what is not used, with the reason in a few words, e.g. "hidden"."""
        if names:
            self.counts[reason] += len(names)
            kept = self.names.setdefault(reason, [])
            kept.extend(names[: KEPT - len(kept)])

    def update(self, other: "Unused", folder: str = "") -> None:
        """Add the counts of another object, whose names are relative to a folder."""
        for reason, count in other.counts.items():
            self.counts[reason] += count
            kept = self.names.setdefault(reason, [])
            names = other.names[reason][: KEPT - len(kept)]
            kept.extend(f"{folder}/{name}" if folder else name for name in names)

    def notes(self) -> list[str]:
        """Return a line per reason."""
        return [f"not used, {reason}: {count} ({self._some(reason)})" for reason, count in self.counts.items()]

    def to_list(self) -> list[dict[str, Any]]:
        """Return reasons, counts and the first names as plain JSON types."""
        return [{"reason": r, "count": n, "examples": self.names[r][:SHOWN]} for r, n in self.counts.items()]

    def _some(self, reason: str) -> str:
        names = [name if len(name) <= 120 else f"{name[:57]}...{name[-60:]}" for name in self.names[reason][:SHOWN]]
        return ", ".join(names) + (", ..." if self.counts[reason] > SHOWN else "")
