"""Refusals, and the headers that every answer has."""

import asyncio
import contextlib
from typing import Any

from starlette.requests import ClientDisconnect, Request

DRAIN_SECONDS = 2.0  # how long a refused body is still read, so that the client can read the answer
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Refusal(Exception):
    """A request that is not served.

    Args:
        status: HTTP status.
        code: One word for programs.
        message: What is wrong and what to do.
        headers: Further headers, e.g. Retry-After.
    """

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


def reason(code: str, message: str) -> dict[str, Any]:
    """Return the JSON body of every refusal."""
    return {"error": {"code": code, "message": message}}


async def drain(request: Request) -> None:
    """Read and drop the rest of a body for a moment, because the client might lose the answer if the connection
    closed at once.
    """
    with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):
        async with asyncio.timeout(DRAIN_SECONDS):
            async for _ in request.stream():
                pass
