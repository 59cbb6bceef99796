"""The limits of requests, and each client's share of them."""

from dataclasses import dataclass

from convmixer.errors import RequestError


@dataclass(frozen=True)
class Limits:
    """Limits of requests.

    Args:
        body_bytes: Size of a body in bytes.
        pixels: Pixels of one image, width times height, as its header says.
        images: Images in one request.
        queue: Images that may wait to be computed; also the number of requests that are read or decoded at once.
        batch: Images computed at once.
        send_seconds: Time for a request's head to arrive, and the same again for its body.
        answer_seconds: Time from the end of a request to its answer.
        held_bytes: Bytes of all bodies that are read or decoded at once.
        connections: Open connections.

    Each client gets at most half of the connections, of the requests being read or decoded, and of the bytes.
    """

    body_bytes: int = 16 << 20
    pixels: int = 50_000_000
    images: int = 32
    queue: int = 256
    batch: int = 32
    send_seconds: float = 10.0
    answer_seconds: float = 30.0
    held_bytes: int = 512 << 20
    connections: int = 800

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise RequestError(f"the limit {name} must be above 0, not {value:g}")
        if self.images > self.queue or self.body_bytes > self.held_bytes:
            raise RequestError(
                f"a request of {self.images} images in {self.body_bytes} bytes would never be accepted: at most "
                f"{self.queue} images wait, and {self.held_bytes} bytes are held"
            )

    def share(self, most: int) -> int:
        """Return one client's share of a limit: half, but at least one."""
        return max(1, most // 2)
