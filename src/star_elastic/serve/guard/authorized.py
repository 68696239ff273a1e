"""Who may ask: every path but the open ones needs a key, those that do not exist included."""

from collections.abc import Collection

from star_elastic.serve.guard.asgi import App, Receive, Scope, Send, refuse, values_of
from star_elastic.serve.keys import Key, Keys

_ADMIN = "/admin"
_CHALLENGE = [(b"www-authenticate", b"Bearer")]


class Authorized:
    """401 without a key of the file, 403 for /admin without an admin's.

    The app finds the `Key` in `scope["state"]["key"]`; None where no keys are configured, and on
    open paths. The key as it was sent is left in no message and no log.
    """

    def __init__(
        self,
        app: App,
        keys: Keys | None,
        open_paths: Collection[str] = ("/health",),
        open_admin: bool = False,
    ) -> None:
        """
        Args:
            keys: None: everybody may ask.
            open_paths: exact paths that need no key.
            open_admin: without keys, may everybody administer?
        """
        self._app, self.keys = app, keys
        self._open, self._open_admin = frozenset(open_paths), open_admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path, key = _path(scope), None
        if path not in self._open and self.keys is not None:
            key = self.keys.check(_presented(scope))
            if key is None:
                await _unknown(scope, receive, send)
                return
        if _is_admin(path) and not self._may_administer(key):
            message = "this path needs the key of an administrator"
            await refuse(scope, receive, send, 403, message, code="admin_only")
            return
        scope["state"] = {**scope.get("state", {}), "key": key}
        await self._app(scope, receive, send)

    def _may_administer(self, key: Key | None) -> bool:
        if self.keys is None:
            return self._open_admin
        return key is not None and key.admin


async def _unknown(scope: Scope, receive: Receive, send: Send) -> None:
    said = bool(values_of(scope, b"authorization"))
    message = "this API key is not known here" if said else "no API key"
    message += "; send one as Authorization: Bearer KEY"
    await refuse(scope, receive, send, 401, message, code="invalid_api_key", headers=_CHALLENGE)


def _presented(scope: Scope) -> str | None:
    headers = values_of(scope, b"authorization")
    if len(headers) != 1:
        return None
    scheme, _, key = headers[0].partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def _path(scope: Scope) -> str:
    """The path as routes know it: below `root_path`, where a proxy has put us."""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    below = path.removeprefix(root)
    return below if below.startswith("/") else path


def _is_admin(path: str) -> bool:
    """Whatever a router may take for /admin or a path below it."""
    first = path.lstrip("/").split("/")[0]
    return first.lower() == _ADMIN.lstrip("/")
