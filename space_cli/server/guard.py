"""Where the server listens and who may use it: Host, Origin and key are checked first.

A web page can make its reader's browser send requests to 127.0.0.1, under its own name as Origin, or, once its name has
been made to point there, as Host. Neither gets an answer.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from space_cli.errors import UsageProblem, system_reason
from space_cli.server.errors import ApiError

_OPEN_PATHS = ("/health",)


@dataclass(frozen=True, slots=True)
class Access:
    """Who may use the server.

    Attributes:
        api_key: that requests must bring; None asks for none.
        hosts: names by which the server may be called, beside localhost and addresses.
        origins: of web pages that may call it.
    """

    api_key: str | None = None
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()

    def check(self, path: str, headers: Headers) -> None:
        """Raise `ApiError` unless the request may pass."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            raise ApiError(403, "this Host is not served; see --allow-host", code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins:
            raise ApiError(403, "web pages of this Origin may not call; see --allow-origin", code="origin_not_allowed")
        foreign = headers.get("sec-fetch-site", "none") in ("cross-site", "same-site")
        if origin is None and foreign and headers.get("sec-fetch-mode") != "navigate":
            raise ApiError(403, "web pages may not call; see --allow-origin", code="origin_not_allowed")
        if self.api_key is not None and path not in _OPEN_PATHS and not self._has_key(headers):
            raise ApiError(
                401, "no valid API key", code="invalid_api_key", headers={"WWW-Authenticate": 'Bearer realm="space"'}
            )

    def _is_own(self, host: str) -> bool:
        """Return whether a Host is ours; a numeric one is no name that could have been made to point here."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name == "localhost" or name in self.hosts or _is_address(name)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = (self.api_key or "").encode()
        return hmac.compare_digest(given.strip().encode(), key) and scheme.lower() == "bearer"


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


class Guard:
    """Middleware that passes allowed requests to `app` and answers the others."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if scope["method"] == "OPTIONS" and origin in self._access.origins:
            # a browser's preflight request carries no key
            await Response(None, 204, headers=_allowed(origin, _PREFLIGHT))(scope, receive, send)
            return
        try:
            self._access.check(scope["path"], headers)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send if origin is None else _naming(origin, send))


_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "authorization, content-type",
    "Access-Control-Max-Age": "600",
}


def _allowed(origin: str | None, more: dict[str, str]) -> dict[str, str]:
    return {"Access-Control-Allow-Origin": origin or "", "Vary": "Origin", **more}


def _naming(origin: str, send: Send) -> Send:
    """Return a `send` that adds the CORS headers for the page's origin."""

    async def naming(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(_allowed(origin, {}))
        await send(message)

    return naming


def known_hosts(host: str, more: Iterable[str]) -> frozenset[str]:
    """Return the names by which a server that listens on `host` may be called."""
    return frozenset(name.lower() for name in (host, *more))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket on an address.

    Raises:
        UsageProblem: it is no address of this machine, or taken.
    """
    listening = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        # connections wait here while the model is loaded
        listening.listen(128)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise UsageProblem(f"--host {host} --port {port}: {system_reason(error)}") from error
    return listening
