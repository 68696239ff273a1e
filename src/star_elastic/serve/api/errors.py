"""Errors as OpenAI's clients read them: one shape, whatever went wrong."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from star_elastic.serve.answers import AnswerFailed
from star_elastic.serve.policy import Refused
from star_elastic.serve.schema import BadRequest, error_body
from star_elastic.serve.service import Draining

_DRAIN_RETRY_S = 5
_log = logging.getLogger(__name__)


def handle_errors(app: FastAPI) -> None:
    """Turn what the routes raise into replies."""

    @app.exception_handler(BadRequest)
    async def bad(_: Request, error: BadRequest) -> JSONResponse:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        if error.retry_after_s is None:
            return _reply(400, "invalid_request_error", str(error), "no_size")
        return _reply(429, "rate_limit_error", str(error), "overloaded", error.retry_after_s)

    @app.exception_handler(Draining)
    async def draining(_: Request, error: Draining) -> JSONResponse:
        why = "the server is about to end"
        return _reply(503, "server_error", why, "draining", _DRAIN_RETRY_S)

    @app.exception_handler(AnswerFailed)
    async def failed(_: Request, error: AnswerFailed) -> JSONResponse:
        return _reply(
            error.status, "server_error", str(error), "answer_failed", error.retry_after_s
        )

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return _reply(error.status_code, "invalid_request_error", str(error.detail), None)

    @app.exception_handler(Exception)
    async def ours(_: Request, error: Exception) -> JSONResponse:
        # its text may quote a prompt
        _log.error("%s in a request", type(error).__name__)
        return _reply(500, "server_error", "an error of this server", "internal_error")


def _reply(
    status: int, kind: str, message: str, code: str | None, retry_after_s: int | None = None
) -> JSONResponse:
    headers: dict[str, Any] = {}
    if retry_after_s is not None:
        headers["retry-after"] = str(retry_after_s)
    return JSONResponse(error_body(message, kind, code=code), status, headers)
