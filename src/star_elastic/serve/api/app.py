"""The OpenAI API over a service, as an ASGI application."""

from fastapi import FastAPI

from star_elastic.serve.api import about, admin, page, talking
from star_elastic.serve.api.described import describe
from star_elastic.serve.api.errors import handle_errors
from star_elastic.serve.opening import Opened

# Health, and files that are the same for everybody; all else wants a key where there are keys.
OPEN = ("/health", "/ready", *page.paths())


def build_app(opened: Opened, administers: bool = False) -> FastAPI:
    """All routes of a service; `guard.guarded` stands before them.

    Args:
        administers: whether sizes and servers behind may be added and removed.
    """
    # the pages that FastAPI would add fetch scripts from elsewhere
    app = FastAPI(title=opened.service.name, docs_url=None, redoc_url=None)
    handle_errors(app)
    app.include_router(talking.routes(opened.service))
    app.include_router(about.routes(opened))
    if administers and opened.sizes is not None:
        app.include_router(admin.size_routes(opened.sizes))
    if administers and opened.upstreams is not None:
        app.include_router(admin.upstream_routes(opened.upstreams))
    app.include_router(page.routes())
    describe(app)
    return app
