"""The routes that tell: models, health, figures, tokens."""

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from star_elastic.serve.opening import Opened
from star_elastic.serve.schema import BadRequest, model_list
from star_elastic.serve.schema.tokens import DetokenizeRequest, TokenizeRequest
from star_elastic.serve.service import Service
from star_elastic.serve.status import status


def routes(opened: Opened) -> APIRouter:
    """All but the answers, of a service."""
    router, service = APIRouter(), opened.service

    @router.get("/health")
    async def health() -> Response:
        """Whether the process lives."""
        return Response(status_code=200)

    @router.get("/ready")
    async def ready() -> Response:
        """Whether it takes requests: no longer, once it drains."""
        return Response(status_code=200 if service.ready else 503)

    @router.get("/version")
    async def versions() -> dict[str, str]:
        return {"version": version("star-elastic")}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @router.get("/status")
    async def now() -> dict[str, Any]:
        behind = [] if opened.upstreams is None else opened.upstreams.states()
        memory = opened.memory()
        return {**status(service, memory), "upstreams": [asdict(each) for each in behind]}

    @router.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(_models(service))

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        for each in _models(service)["data"]:
            if each["id"] == name:
                return JSONResponse(each)
        raise BadRequest(
            f"model: {name[:80]!r} is not served here", "model", code="model_not_found", status=404
        )

    @router.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        wanted, _ = await service.read(TokenizeRequest, await request.body())
        ids = await service.prompts.tokenize(wanted)
        return {"count": len(ids), "max_model_len": service.limits.context_tokens, "tokens": ids}

    @router.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, str]:
        wanted, _ = await service.read(DetokenizeRequest, await request.body())
        return {"prompt": service.prompts.decode(wanted.tokens)}

    return router


def _models(service: Service) -> dict[str, Any]:
    efforts = service.settings.thinking.efforts if service.thinks else None
    return model_list(
        service.name,
        list(service.sizes),
        service.created,
        service.limits.context_tokens,
        None if efforts is None else {str(effort): n for effort, n in efforts.items()},
    ).model_dump(mode="json")
