"""Sizes that come, go and change while others answer: a new one is a new set of views."""

import asyncio
from collections.abc import Mapping

from star_elastic.layout import Layout
from star_elastic.serve.local import Local
from star_elastic.serve.policy import Size
from star_elastic.serve.schema import BadRequest
from star_elastic.serve.service import Service
from star_elastic.submodel import Fields, Submodel, submodel


class Sizes:
    """The sizes that the engine here serves, and the service that must know of them."""

    def __init__(
        self, service: Service, local: Local, layout: Layout, named: Mapping[str, Submodel]
    ) -> None:
        """`named`: the checkpoint's own sizes, which may be put by name alone."""
        self._service, self._local, self._layout, self._named = service, local, layout, named
        self._changing = asyncio.Lock()

    async def put(self, name: str, fields: Fields | None) -> Size:
        """Serve one size more, or another one by this name.

        Raises:
            BadRequest: a size that the parent cannot hold; no fields, and no such named size.
        """
        if fields is None:
            if name not in self._named:
                known = ", ".join(self._named)
                raise BadRequest(f"config: say its fields; {name!r} is not among {known}", "config")
            fields = self._named[name].config
        async with self._changing:
            try:
                made = submodel(self._layout, name, fields, trained=False)
                await self._local.put(name, fields)
            except ValueError as error:
                raise BadRequest(f"config: {error}", "config") from None
            size = Size(name, made.active_params)
            others = [each for each in self._service.sizes.values() if each.name != name]
            backends = {**self._service.backends, name: self._local}
            self._service.set_sizes([*others, size], backends)
            return size

    async def remove(self, name: str) -> None:
        """Take no more requests at a size; what is in flight goes on.

        Raises:
            BadRequest: it is not served here (404), the last one, or one that a policy names.
        """
        async with self._changing:
            backends = dict(self._service.backends)
            if backends.get(name) is not self._local:
                raise BadRequest(f"size: {name[:80]!r} is not served here", "size", status=404)
            left = [each for each in self._service.sizes.values() if each.name != name]
            del backends[name]
            try:
                self._service.set_sizes(left, backends)
                await self._local.remove(name)
            except ValueError as error:
                raise BadRequest(f"size: {error}", "size") from None
