"""The exceptions that the command line prints as one line: a wrong request (status 2), a failure (status 1)."""

import difflib
from collections.abc import Iterable


class RequestError(ValueError):
    """A request that cannot be carried out; the message says what is wrong and what to do."""


class Failed(RuntimeError):
    """A request that was tried and failed; the message says why."""


class PeerLost(Failed):
    """Another process of the same training no longer answers."""


def shown(value: object, most: int = 60) -> str:
    """Return an untrusted value as text for a message: one printable line of at most `most` characters."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else "?" for c in text[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."


def unknown(kind: str, name: object, known: Iterable[str]) -> RequestError:
    """Return the error for a name that is not known, suggesting the nearest one.

    Args:
        kind: The kind of thing that is named, e.g. "recipe" or "setting".
        name: The unknown name.
        known: The known names.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names[:20])}"
    return RequestError(f"unknown {kind} {name!r}: {hint}")
