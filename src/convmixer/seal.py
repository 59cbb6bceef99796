"""Marks weights that this user trained with a seal. A data path in weights is opened only if it has this user's seal.

The seal is a keyed hash of the data's path. The key is in this user's state folder, so nobody else can make the seal.
Standard library only.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

_KEY_BYTES = 32


def make_seal(text: str) -> str | None:
    """Return the seal of a text, or None if no key can be stored, e.g. because the home folder is read-only."""
    key = _read_key() or _make_key()
    return None if key is None else _seal(key, text)


def is_sealed(text: str, seal: object) -> bool:
    """Return whether a seal was made by this user for this text."""
    key = _read_key()
    return key is not None and isinstance(seal, str) and hmac.compare_digest(_seal(key, text), seal)


def _seal(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(errors="surrogateescape"), hashlib.sha256).hexdigest()


def _key_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "convmixer" / "key"


def _read_key() -> bytes | None:
    try:
        key = _key_file().read_bytes()
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return None
    return key if len(key) == _KEY_BYTES else None


def _make_key() -> bytes | None:
    with contextlib.suppress(OSError, RuntimeError):
        path = _key_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(handle, secrets.token_bytes(_KEY_BYTES))
        finally:
            os.close(handle)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)  # if two processes start together, the first one's key stays
        draft.unlink()
    return _read_key()
