"""Whose name the request is for, and from whose page it comes.

A page of any site may make its visitor's browser send requests here. Two things give it away: the
`Origin` it comes from, and, where the attacker lets the name of the own site point to this machine
(DNS rebinding), the `Host` it believes to speak to. An address has no name that could be rebound,
so a Host that is one passes: probes and balancers use it.
"""

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from star_elastic.serve.guard.asgi import App, Message, Receive, Scope, Send, refuse
from star_elastic.serve.guard.asgi import values_of as values

LOCAL = ("localhost", "127.0.0.1", "[::1]")
_MAX_AGE = b"600"  # seconds for which a browser need not ask again
_PORTS = {"http": "80", "https": "443"}


class Hosts:
    """403 for a Host or an Origin that is not ours; CORS headers for origins that are listed."""

    def __init__(
        self, app: App, allowed: Collection[str] = LOCAL, origins: Collection[str] = ()
    ) -> None:
        """
        Args:
            allowed: names, with a port or for any; `*` for all.
            origins: pages that may call besides our own ("https://chat.example"); `*` for all.
        """
        self._app = app
        self._allowed = {name.lower().rstrip(".") for name in allowed}
        self._origins = {origin.lower().rstrip("/") for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        hosts, origins = values(scope, b"host"), values(scope, b"origin")
        if len(hosts) != 1 or not self._is_ours(hosts[0].lower()):
            said = repr(hosts[0][:80]) if hosts else "nothing"
            message = f"Host: {said} is not served here; the operator can allow it"
            await refuse(scope, receive, send, 403, message, code="host_not_allowed")
        elif not origins:
            await self._app(scope, receive, send)
        elif len(origins) == 1 and self._is_listed(origins[0]):
            await self._across(origins[0], scope, receive, send)
        elif len(origins) == 1 and _is_same(origins[0], hosts[0]):
            await self._app(scope, receive, send)
        else:
            message = f"Origin: {origins[0][:80]!r} may not call this server"
            await refuse(scope, receive, send, 403, message, code="origin_not_allowed")

    def _is_ours(self, host: str) -> bool:
        name, port = _split(host)
        plain = name.rstrip(".")
        return bool({"*", plain, f"{plain}:{port}"} & self._allowed) or _is_address(plain)

    def _is_listed(self, origin: str) -> bool:
        return bool({"*", origin.lower()} & self._origins)

    async def _across(self, origin: str, scope: Scope, receive: Receive, send: Send) -> None:
        """A request from another site's page: the browser wants to hear that it may."""
        allowed = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin")]

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *allowed]}
            await send(message)

        asks = scope.get("method") == "OPTIONS" and values(scope, b"access-control-request-method")
        if not asks:
            await self._app(scope, receive, sent)
            return
        more = [
            (b"access-control-allow-methods", b"GET, POST, DELETE"),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-max-age", _MAX_AGE),
        ]
        await sent({"type": "http.response.start", "status": 204, "headers": more})
        await sent({"type": "http.response.body", "body": b""})


def _split(host: str) -> tuple[str, str]:
    """Name and port of a Host header; the port is empty if there is none."""
    if host.endswith("]") or ":" not in host:
        return host, ""
    name, _, port = host.rpartition(":")
    return name, port


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _is_same(origin: str, host: str) -> bool:
    """Is this the origin of the server's own pages? The scheme is that of the proxy before it."""
    own = _authority(f"//{host}", origin)
    return own is not None and own == _authority(origin)


def _authority(url: str, like: str = "") -> str | None:
    """Name and port, the port filled in from the scheme (that of `like`, if there is none)."""
    try:
        parts, scheme = urlsplit(url.lower()), urlsplit((like or url).lower()).scheme
        port = parts.port or _PORTS.get(scheme)
    except ValueError:
        return None
    return f"{parts.hostname}:{port}" if parts.hostname and port and "@" not in url else None
