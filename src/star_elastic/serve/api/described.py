"""What `/openapi.json` says of bodies that are read by hand."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from star_elastic.serve.schema import ChatRequest, CompletionRequest
from star_elastic.serve.schema.tokens import DetokenizeRequest, TokenizeRequest

_BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


def describe(app: FastAPI) -> None:
    """Add the schemas of the bodies to those that FastAPI knows of."""
    stock = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = stock()
            kinds = [(kind, "validation") for kind in _BODIES.values()]
            _, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
            parts = document.setdefault("components", {}).setdefault("schemas", {})
            parts |= schemas["$defs"]
            for path, kind in _BODIES.items():
                reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
                document["paths"][path]["post"]["requestBody"] = {
                    "required": True,
                    "content": {"application/json": {"schema": reference}},
                }
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
