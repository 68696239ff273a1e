"""Sizes and servers behind that come and go. Off unless the operator turns it on."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field

from star_elastic.serve.schema import BadRequest, read
from star_elastic.serve.schema.requests import Known
from star_elastic.serve.sizes import Sizes
from star_elastic.serve.upstream import Spec, Upstreams

Amount = int | list[int]


class PutSize(Known):
    """A size: some of its family's config fields; the checkpoint's own if it says none."""

    config: dict[str, Amount] | None = Field(default=None, max_length=64)


class PutUpstream(Known):
    """A server of a size that is served already, as `--upstream` has it; no key can be said."""

    upstream: str = Field(max_length=2048)


class NameUpstream(Known):
    """A server behind."""

    url: str = Field(max_length=2048)


def size_routes(sizes: Sizes) -> APIRouter:
    """`/admin/sizes/NAME`: PUT one (new, or another by this name), DELETE one."""
    router = APIRouter(prefix="/admin")

    @router.put("/sizes/{name}")
    async def put(name: str, request: Request) -> dict[str, Any]:
        wanted, _ = read(PutSize, await request.body())
        size = await sizes.put(name, wanted.config)
        return {"name": size.name, "active_params": size.active_params}

    @router.delete("/sizes/{name}")
    async def remove(name: str) -> dict[str, Any]:
        await sizes.remove(name)
        return {"name": name, "removed": True}

    return router


def upstream_routes(upstreams: Upstreams) -> APIRouter:
    """`/admin/upstreams`: PUT and DELETE a server, or `drain` and `restore` it."""
    router = APIRouter(prefix="/admin/upstreams")

    @router.put("")
    async def put(request: Request) -> dict[str, Any]:
        wanted, _ = read(PutUpstream, await request.body())
        try:
            spec = Spec.read(wanted.upstream, environ={})
            upstreams.of(spec.size)
            await upstreams.add(spec)
        except ValueError as error:
            raise BadRequest(str(error), "upstream") from None
        return {"url": spec.url, "size": spec.size}

    async def act(request: Request, action: Any) -> dict[str, Any]:
        wanted, _ = read(NameUpstream, await request.body())
        try:
            action(wanted.url)
        except ValueError as error:
            raise BadRequest(str(error), "url", status=404) from None
        return {"url": wanted.url}

    @router.delete("")
    async def remove(request: Request) -> dict[str, Any]:
        return await act(request, upstreams.remove)

    @router.post("/drain")
    async def drain(request: Request) -> dict[str, Any]:
        return await act(request, upstreams.drain)

    @router.post("/restore")
    async def restore(request: Request) -> dict[str, Any]:
        return await act(request, upstreams.restore)

    return router
