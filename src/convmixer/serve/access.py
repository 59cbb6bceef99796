"""Access control: the server's host names, pages of other origins, and the bearer token."""

import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from convmixer.errors import RequestError
from convmixer.serve.http import HEADERS, Refusal, drain, reason

_HOST = re.compile(r"[a-z0-9._-]+", re.ASCII)
_ORIGIN = re.compile(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d{1,5})?", re.ASCII)


@dataclass(frozen=True)
class Access:
    """Access control.

    Args:
        token: Bearer token that clients of /v1 and /metrics must send; None: no token is needed.
        hosts: Host names that the server answers to, besides localhost and IP addresses. Other names are refused,
            because another site could point its own name at this machine (DNS rebinding).
        origins: Sites whose pages may use the API, such as https://example.org; "*": all.
        root_path: URL prefix under which a proxy serves this server, such as /classify.
    """

    token: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    root_path: str = ""

    def __post_init__(self) -> None:
        for host in self.hosts:
            if not _HOST.fullmatch(host.lower()):
                raise RequestError(f"--allowed-host {host!a} is not a name: leave out scheme, port and path")
        for origin in self.origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin.lower()):
                raise RequestError(f"--cors {origin!a} is not an origin, such as https://example.org:8080, or *")
        if self.root_path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", self.root_path):
            raise RequestError(f"--root-path {self.root_path!a} must look like /classify")

    def check_host(self, scope: Scope) -> None:
        """Check that a request is addressed to this server.

        Raises:
            Refusal: 421 if it is addressed to another server; 400 if it has no Host header or several.
        """
        given = _values(scope, b"host")
        if not given and scope["http_version"] == "1.0":
            return
        if len(given) != 1:
            raise Refusal(400, "bad_host", "a request must have one Host header")
        if not self._is_ours(given[0]):
            text = "this server does not answer to that name: start it with --allowed-host NAME"
            raise Refusal(421, "wrong_host", text)

    def check_origin(self, scope: Scope) -> None:
        """Check that the request does not come from a page of another site in a visitor's browser.

        Raises:
            Refusal: 403 if it does.
        """
        for origin in _values(scope, b"origin"):
            netloc = origin.partition("://")[2]
            name = (urlsplit(f"//{netloc}").hostname or "") if _ORIGIN.fullmatch(origin) else ""
            same = netloc in _values(scope, b"host") or name in (host.lower() for host in self.hosts)
            if not same and origin not in self.origins and "*" not in self.origins:
                text = "pages of that origin may not use this server: start it with --cors ORIGIN"
                raise Refusal(403, "wrong_origin", text)

    async def check_token(self, request: Request) -> None:
        """Check the bearer token.

        Raises:
            Refusal: 401 if the token is missing or wrong.
        """
        if self.token is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            await drain(request)
            text = "send the header Authorization: Bearer TOKEN"
            raise Refusal(401, "unauthorised", text, {"www-authenticate": "Bearer"})

    def _is_ours(self, host: str) -> bool:
        name = re.sub(r":\d{1,5}$", "", host)
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
            return True
        except ValueError:
            return name in ("localhost", *(host.lower() for host in self.hosts))


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip().lower() for key, value in scope["headers"] if key == name]


class Guard:
    """ASGI middleware: checks Host and Origin, answers HEAD, adds `HEADERS` to every response, and counts responses.

    Args:
        app: The application.
        access: Access control.
        count: Called with the route's path ("other" if there is none) and the status.
    """

    def __init__(self, app: ASGIApp, access: Access, count: Callable[[str, int], None]) -> None:
        self.app, self.access, self.count = app, access, count
        self.pairs = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        method = "GET" if scope["method"] == "HEAD" else scope["method"]  # uvicorn leaves out the body of HEAD
        scope = {**scope, "method": method, "root_path": self.access.root_path}

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(p for p in self.pairs if p[0] not in present)]
                # count by route, not by path: each path that is requested would become a new series
                self.count(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal:
                await drain(Request(scope, receive))
                return await refusal(scope, receive, with_headers)
            await self.app(scope, receive, with_headers)
        except Exception:  # the outer application answers it with a 500
            self.count(getattr(scope.get("route"), "path", "other"), 500)
            raise

    def _refusal(self, scope: Scope) -> Callable[[Scope, Receive, Send], Awaitable[None]] | None:
        try:
            self.access.check_host(scope)
            if scope["method"] not in ("GET", "HEAD", "OPTIONS"):  # these change nothing
                self.access.check_origin(scope)
        except Refusal as error:
            return JSONResponse(reason(error.code, error.message), error.status, error.headers)
        return None
