"""Runs the server process: its address, its token, its shutdown."""

import ctypes
import ipaddress
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn

from convmixer.errors import RequestError
from convmixer.exported.samples import choose_samples
from convmixer.inference import load_classifier
from convmixer.run_folder import sample_files
from convmixer.serve.access import Access
from convmixer.serve.app import create_app
from convmixer.serve.limits import Limits
from convmixer.serve.protocol import Protocol
from convmixer.text import terminal


def read_token(path: Path | None) -> str | None:
    """Return the bearer token in a file, else in the environment variable CONVMIXER_TOKEN, else None.

    Raises:
        RequestError: The file cannot be read, or its contents cannot be sent in a header.
    """
    source = f"the token file {path}" if path else "CONVMIXER_TOKEN"
    try:
        text = path.read_text(encoding="utf-8") if path else os.environ.get("CONVMIXER_TOKEN", "")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {source}: {getattr(error, 'strerror', None) or error}") from error
    if not path and not text:
        return None
    token = text.strip()
    if not token:
        raise RequestError(f"{source} is empty")
    if not (token.isascii() and token.isprintable()):
        raise RequestError(f"{source} must hold one line of ASCII: HTTP headers carry nothing else")
    return token


def is_loopback(host: str) -> bool:
    """Return whether only this machine can connect to an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def protocol(limits: Limits) -> type[Protocol]:
    """Return the class that handles HTTP within limits."""
    most = min(limits.connections, _open_files() - 100)
    values = {"seconds": limits.send_seconds, "most": most, "most_per_client": limits.share(most)}
    return type("LimitedProtocol", (Protocol,), values)


def _open_files() -> int:
    """Raise the limit of open files if possible, and return it."""
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = min(hard, 4096) if hard != resource.RLIM_INFINITY else 4096
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        return max(soft, wanted)
    except (ImportError, OSError, ValueError):
        return 256


def _give_memory_back() -> None:
    """Make the C library (glibc) return the memory of bodies and pixels to the system when it is freed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD; set once, it no longer grows with what is freed


def _is_name(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
        return False
    except ValueError:
        return True


def serve(
    weights: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    precision: str = "auto",
    access: Access | None = None,
    limits: Limits | None = None,
    samples: str | None = None,
    expected: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Serve weights until SIGTERM or SIGINT, then finish the requests that were accepted.

    Args:
        weights: See `load_classifier`.
        host: Address to listen on. Other machines can connect, unless it is a loopback address.
        port: Port; 0: any free port, which is printed.
        precision: See `load_classifier`.
        access: Who may send requests; None: anyone who can connect. `host` is added to its host names.
        limits: Limits of requests; None: the defaults.
        samples: Pictures that the page offers: a run, a folder of images, or "none". None: those saved with the
            weights if only this machine can connect, else none.
        expected: Overrides of the weights' input settings, see `load_classifier`.

    Raises:
        RequestError: The weights or samples cannot be loaded, or the server cannot listen on the address.
    """
    limits, access = limits or Limits(), access or Access()
    if not 0 <= port <= 65535:
        raise RequestError(f"the port must be from 0 to 65535, not {port}")
    classifier = load_classifier(weights, precision, expected=expected)
    own = sample_files(str(classifier.describe["source"])) if is_loopback(host) else []
    pictures, said = choose_samples(samples, own)
    if _is_name(host):
        access = replace(access, hosts=(*access.hosts, host))
    app = create_app(classifier, limits, access, pictures)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol(limits),
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(limits.send_seconds + limits.answer_seconds) + 5,
    )
    try:
        socket = config.bind_socket()
    except SystemExit:
        raise RequestError(f"cannot listen on {host}:{port}: is the port taken?") from None
    address = f"http://{f'[{host}]' if ':' in host else host}:{socket.getsockname()[1]}"
    print(
        f"serving {terminal(weights)} on {address} (docs: {address}/docs); stop with Ctrl-C\n{terminal(said)}\n"
        f"model: {terminal(classifier.describe.get('found') or 'exported')}",
        flush=True,
    )
    _give_memory_back()
    # uvicorn raises the signal again after it has shut down; then all is done, and the exit status should be 0
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: None)
    uvicorn.Server(config).run([socket])
    return {"address": address}
