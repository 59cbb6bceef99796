"""Fetches one image from a URL that the user typed, within limits of time and size, and from no unintended address.

Redirects are followed only to http or https, and never from https to http. Some addresses are not public: this
machine, the local network, a cloud's metadata. They are used only if the user's own URL contains localhost or the IP
address itself, so neither a host name nor a redirect can lead there. The connection goes to exactly the address that
was checked. Proxies and cookies are not used. Standard library only.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import SplitResult, urljoin, urlsplit

from convmixer.errors import shown

MOST_BYTES = 64 << 20
SECONDS = 30.0  # limit for the whole fetch
REDIRECTS = 4
CHUNK = 1 << 16
AGENT = "convmixer-predict"


def is_url(text: str) -> bool:
    """Return whether a text is an http or https URL."""
    return text.lower().startswith(("http://", "https://"))


def fetch(url: str) -> bytes:
    """Return the contents of a URL.

    Raises:
        OSError: The URL cannot be fetched, takes too long, or leads to a forbidden address.
        ValueError: It is not a URL, or the contents are too large.
    """
    deadline, typed = time.monotonic() + SECONDS, urlsplit(url)
    parts, plain = typed, _is_plain(typed)
    for _ in range(REDIRECTS + 1):
        found = _get(parts, plain and parts.hostname == typed.hostname, deadline)
        if isinstance(found, bytes):
            return found
        parts = _next(parts, found)
    raise OSError(f"more than {REDIRECTS} redirects")


def _is_plain(url: SplitResult) -> bool:
    """Return whether a URL names its address directly, as localhost or as an IP address."""
    return url.hostname == "localhost" or _address(url.hostname or "") is not None


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _next(here: SplitResult, location: str) -> SplitResult:
    """Return where a redirect leads.

    Raises:
        OSError: The redirect is not allowed.
    """
    there = urlsplit(urljoin(here.geturl(), location))
    if there.scheme not in ("http", "https") or (here.scheme, there.scheme) == ("https", "http"):
        raise OSError(f"a redirect to {shown(there.scheme, 20)}: is not followed")
    return there


def _get(url: SplitResult, plain: bool, deadline: float) -> bytes | str:
    """Return the body, or the URL of a redirect.

    Raises:
        OSError, ValueError: See `fetch`.
    """
    if not url.hostname or url.username is not None:
        raise ValueError("the URL names no host" if not url.hostname else "a URL with a password is not used")
    try:
        with _answer(url, plain, deadline) as answer:
            if answer.status in (301, 302, 303, 307, 308) and answer.getheader("Location"):
                return str(answer.getheader("Location"))
            if answer.status != 200:
                raise OSError(f"the server answers {answer.status} {shown(answer.reason, 40)}")
            return _body(answer)
    except (http.client.HTTPException, ssl.SSLError) as error:
        raise OSError(f"no valid answer: {shown(str(error) or type(error).__name__)}") from error
    finally:
        if time.monotonic() >= deadline:
            raise OSError(f"it takes more than {SECONDS:g} s")


@contextmanager
def _answer(url: SplitResult, plain: bool, deadline: float) -> Iterator[http.client.HTTPResponse]:
    """Yield the answer to a request; at the deadline the connection is closed, so that nothing waits longer."""
    assert url.hostname
    port = url.port or (443 if url.scheme == "https" else 80)
    left = max(0.1, deadline - time.monotonic())
    plugs = [socket.create_connection((_resolve(url.hostname, port, plain), port), timeout=left)]
    timer = threading.Timer(max(0.1, deadline - time.monotonic()), lambda: _shut(plugs[-1]))
    timer.daemon = True
    timer.start()
    connection = http.client.HTTPConnection(url.hostname, port)
    try:
        if url.scheme == "https":
            plugs.append(ssl.create_default_context().wrap_socket(plugs[0], server_hostname=url.hostname))
            connection.default_port = 443  # the port that the Host header leaves out
        connection.sock = plugs[-1]
        path = f"{url.path or '/'}{'?' + url.query if url.query else ''}"
        connection.request("GET", path, headers={"User-Agent": AGENT, "Accept": "image/*", "Connection": "close"})
        with connection.getresponse() as answer:
            yield answer
    finally:
        timer.cancel()
        connection.close()
        plugs[-1].close()


def _shut(plug: socket.socket) -> None:
    with suppress(OSError):
        plug.shutdown(socket.SHUT_RDWR)


def _resolve(host: str, port: int, plain: bool) -> str:
    """Return an address of a host to which a connection is allowed.

    Raises:
        OSError: There is none.
    """
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    allowed = [text for text in found if plain or ((ip := _address(text)) and ip.is_global and not ip.is_multicast)]
    if not allowed:
        raise OSError(f"{shown(host)} is an address inside this network, used only if typed as a number or localhost")
    return allowed[0]


def _body(answer: http.client.HTTPResponse) -> bytes:
    """Return the body of an answer.

    Raises:
        ValueError: It is too large.
        OSError: It is incomplete.
    """
    parts, size = [], 0
    while part := answer.read(CHUNK):
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES >> 20} MiB: not an image to classify")
    if answer.length:
        raise OSError("the answer is incomplete")
    return b"".join(parts)
