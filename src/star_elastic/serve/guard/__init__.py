"""What stands before the app: limits on what a request may be, and on who may send it.

Each is a middleware of its own, for any ASGI app; `guarded` puts them in their order, the cheapest
refusal first, and no body is read of a client without a key. `server_options` is for uvicorn.
"""

from collections.abc import Collection

from star_elastic.serve.guard.asgi import App, refuse
from star_elastic.serve.guard.authorized import Authorized
from star_elastic.serve.guard.body import Body
from star_elastic.serve.guard.connections import Connections, allow_files
from star_elastic.serve.guard.headers import Headers, Secured
from star_elastic.serve.guard.hosts import LOCAL, Hosts
from star_elastic.serve.guard.protocol import Deadlines, GuardedProtocol, server_options
from star_elastic.serve.keys import Keys

__all__ = [
    "LOCAL",
    "App",
    "Authorized",
    "Body",
    "Connections",
    "Deadlines",
    "GuardedProtocol",
    "Headers",
    "Hosts",
    "Secured",
    "allow_files",
    "guarded",
    "refuse",
    "server_options",
]


def guarded(
    app: App,
    keys: Keys | None,
    *,
    hosts: Collection[str] = LOCAL,
    origins: Collection[str] = (),
    open_paths: Collection[str] = ("/health",),
    open_admin: bool = False,
    max_body_bytes: int = 8 * 2**20,
    body_seconds: float = 30.0,
) -> App:
    """The app behind all of them; what the arguments mean is said at each."""
    app = Body(app, max_body_bytes, body_seconds)
    app = Authorized(app, keys, open_paths, open_admin)
    app = Hosts(app, hosts, origins)
    return Secured(Headers(app))
