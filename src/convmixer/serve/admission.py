"""Admission: limits the number of requests and the bytes of their bodies, in total and per client."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from convmixer.serve.http import Refusal
from convmixer.serve.limits import Limits


def busy() -> Refusal:
    """Return the refusal of a request that arrives while the server is full."""
    return Refusal(503, "busy", "too many images are waiting: try again later", {"retry-after": "1"})


def client_of(request: Request) -> str:
    """Return the address of a client, without the port."""
    return request.client.host if request.client else ""


class Slot:
    """An admitted request, and the bytes of its body that are in memory.

    Args:
        admission: The object that counts it.
        client: Address of its client.
    """

    def __init__(self, admission: "Admission", client: str) -> None:
        self.admission, self.client, self.bytes = admission, client, 0

    def charge(self, size: int) -> None:
        """Count bytes that have arrived, not bytes that are only announced.

        Raises:
            Refusal: 503 if all clients together have too many bytes in memory; 429 if this client has.
        """
        held, limits = self.admission.bytes, self.admission.limits
        if held.total() + size > limits.held_bytes:
            raise busy()
        # a single body may always have the largest size allowed
        if held[self.client] + size > max(limits.share(limits.held_bytes), limits.body_bytes):
            raise _too_much()
        held[self.client] += size
        self.bytes += size


class Admission:
    """Counts the requests being read or decoded, and their bytes, in total and per client.

    Args:
        limits: The limits.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    @contextmanager
    def slot(self, client: str) -> Iterator[Slot]:
        """Admit a request, and count it until the context ends.

        Raises:
            Refusal: 503 if there are too many requests; 429 if this client has too many.
        """
        if self.requests.total() >= self.limits.queue:
            raise busy()
        if self.requests[client] >= self.limits.share(self.limits.queue):
            raise _too_much()
        self.requests[client] += 1
        slot = Slot(self, client)
        try:
            yield slot
        finally:
            for counter, number in ((self.requests, 1), (self.bytes, slot.bytes)):
                counter[client] -= number
                if not counter[client]:
                    del counter[client]  # else the counter would grow with every client


def _too_much() -> Refusal:
    text = "this client sends too much at once: wait for answers before sending more"
    return Refusal(429, "too_many_requests", text, {"retry-after": "1"})
