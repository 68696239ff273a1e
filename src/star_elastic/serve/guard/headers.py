"""Headers: of requests not too many, on every answer those that browsers heed."""

from star_elastic.serve.guard.asgi import App, Message, Receive, Scope, Send, refuse

_CSP = (
    b"default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'self'; "
    b"frame-ancestors 'none'"
)
_SECURE = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
    b"content-security-policy": _CSP,  # scripts and styles are files: none inline, none from afar
    b"cache-control": b"no-store",  # answers are somebody's; what may be stored says so itself
}


class Headers:
    """431 if a request has more headers than any client sends."""

    def __init__(self, app: App, max_count: int = 100, max_bytes: int = 32 * 2**10) -> None:
        """`max_bytes` of names, values and the address together."""
        self._app, self._max_count, self._max_bytes = app, max_count, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        size += len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
        if len(scope["headers"]) <= self._max_count and size <= self._max_bytes:
            await self._app(scope, receive, send)
            return
        message = f"more than {self._max_count} headers, or {self._max_bytes} bytes of them"
        await refuse(scope, receive, send, 431, message, code="headers_too_large")


class Secured:
    """Puts the headers on every answer, unless the app has set them; the name of the server off."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                said = [each for each in message.get("headers", []) if each[0] != b"server"]
                names = {name.lower() for name, _ in said}
                more = [(name, value) for name, value in _SECURE.items() if name not in names]
                message = {**message, "headers": [*said, *more]}
            await send(message)

        await self._app(scope, receive, secured)
