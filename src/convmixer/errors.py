"""The exceptions that the command line turns into one line: a wrong request (status 2), and a lost process (1)."""

import difflib
from collections.abc import Iterable


class RequestError(ValueError):
    """What was asked for cannot be done; the message says what is wrong and what to do."""


class PeerLost(RuntimeError):
    """Another process of the same training does not answer any more."""


def shown(value: object, most: int = 60) -> str:
    """Return untrusted text or an untrusted value for a message: one printable line, at most `most` characters."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else "?" for c in text[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."


def unknown(kind: str, name: str, known: Iterable[str]) -> RequestError:
    """Return the error for a name that is not known, suggesting the nearest one.

    Args:
        kind: What the name names, e.g. "recipe" or "setting".
        name: The name that was given.
        known: The names there are.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names[:20])}"
    return RequestError(f"unknown {kind} {name!r}: {hint}")
