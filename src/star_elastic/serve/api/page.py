"""The page at `/`: static files of the package, the same for everybody.

The guard's headers forbid scripts and styles that are not such files: what a model writes could do
nothing even if a browser took it for HTML.
"""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter, HTTPException, Request, Response

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_CACHING = {"cache-control": "no-cache"}  # ask each time; the usual answer is 304


@dataclass(frozen=True)
class _File:
    body: bytes
    kind: str
    tag: str


def routes() -> APIRouter:
    """`/` and `/page/NAME`; all files are read here, so that no request names a path."""
    known = _read()
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def index(request: Request) -> Response:
        return _reply(request, known["index.html"])

    @router.get("/page/{name}")
    async def file(request: Request, name: str) -> Response:
        if name not in known:
            raise HTTPException(404, "no such file of the page")
        return _reply(request, known[name])

    return router


def paths() -> list[str]:
    """All that is served here, for whoever lets these pass without a key."""
    return ["/", *(f"/page/{name}" for name in sorted(_read()))]


def _read() -> dict[str, _File]:
    found: dict[str, _File] = {}
    for each in files("star_elastic.serve").joinpath("page").iterdir():
        kind = _TYPES.get(each.name.rpartition(".")[2])
        if kind is not None:
            body = each.read_bytes()
            found[each.name] = _File(body, kind, f'"{hashlib.sha256(body).hexdigest()[:16]}"')
    return found


def _reply(request: Request, file: _File) -> Response:
    headers = {**_CACHING, "etag": file.tag}
    if file.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.kind, headers=headers)
