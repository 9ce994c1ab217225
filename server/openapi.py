"""The OpenAPI description: request bodies that are read by hand, error bodies, headers and the key."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from anybit.server.protocol.chat import ChatRequest
from anybit.server.protocol.common import ErrorResponse
from anybit.server.protocol.completions import CompletionRequest
from anybit.server.protocol.tokens import DetokenizeRequest, TokenizeRequest

_REFERENCE = "#/components/schemas/{model}"
_BODY_MODELS: tuple[type[BaseModel], ...] = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)

_ERROR_TEXTS = {
    400: "The request is wrong; the message says what to change.",
    401: "The API key is missing or wrong.",
    404: "The model is not served here.",
    413: "The request body is too large.",
    429: "The queue is full; the header Retry-After says when to come back.",
    500: "The server met an unexpected error.",
    503: "The model is loading, or the server is shutting down, or its engine is gone.",
}

_GENERATION_HEADERS = [
    {
        "name": "X-Bit-Width",
        "in": "header",
        "required": False,
        "description": "Bits of each weight to read, for example 4.",
        "schema": {"type": "string", "pattern": "^[1-9][0-9]?$"},
    },
    {
        "name": "X-KV-Format",
        "in": "header",
        "required": False,
        "description": "Format of the KV cache.",
        "schema": {"type": "string", "maxLength": 64},
    },
]


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can fail with these statuses."""
    return {status: {"model": ErrorResponse, "description": _ERROR_TEXTS[status]} for status in statuses}


def generation_route(body: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
    """Keyword arguments of a generating route, which reads its body by itself."""
    content = {"text/event-stream": {"schema": {"type": "string"}}}
    return {
        "response_model": None,
        "responses": {
            200: {"model": answer, "description": "The answer, or its stream when stream=true.", "content": content},
            **error_responses(400, 401, 404, 413, 429, 500, 503),
        },
        "openapi_extra": {"parameters": _GENERATION_HEADERS, "requestBody": _request_body(body)},
    }


def body_route(body: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
    """Keyword arguments of a route that reads its body by itself and answers in one piece."""
    return {
        "response_model": answer,
        "responses": error_responses(400, 401, 404, 413, 500, 503),
        "openapi_extra": {"requestBody": _request_body(body)},
    }


def _request_body(body: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": _REFERENCE.format(model=body.__name__)}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


class DescribedApp(FastAPI):
    """An application whose description holds the bodies that FastAPI does not parse."""

    guarded = False  # whether an API key is asked for

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = super().openapi()
            components = schema.setdefault("components", {})
            _, definitions = models_json_schema(
                [(model, "validation") for model in _BODY_MODELS], ref_template=_REFERENCE
            )
            components.setdefault("schemas", {}).update(definitions["$defs"])
            if self.guarded:
                components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
                schema["security"] = [{"bearer": []}]
        return self.openapi_schema or {}
