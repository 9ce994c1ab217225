"""The description of the API says what the API does."""

import json

import pytest
from pydantic import TypeAdapter

from anybit.server.protocol.chat import ChatResponse
from anybit.server.protocol.common import ErrorResponse, ModelList
from anybit.server.protocol.completions import CompletionResponse


@pytest.fixture(scope="module")
def description(server):
    return server.http.get("/openapi.json").json()


def references(node):
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from references(child)


def test_every_reference_leads_somewhere(description):
    found = set(references(description))
    assert found
    for reference in found:
        *path, name = reference.removeprefix("#/").split("/")
        assert path == ["components", "schemas"]
        assert name in description["components"]["schemas"]


def test_every_route_is_described(description):
    assert set(description["paths"]) == {
        "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{model_id}", "/health", "/ready",
        "/version", "/metrics", "/", "/tokenize", "/detokenize",
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_generating_routes_state_body_headers_and_every_status(description, path):
    operation = description["paths"][path]["post"]
    assert {"200", "400", "401", "404", "413", "429", "503"} <= set(operation["responses"])
    assert operation["requestBody"]["required"]
    assert {parameter["name"] for parameter in operation["parameters"]} == {"X-Bit-Width", "X-KV-Format"}
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}


def test_no_route_promises_422(description):
    for operations in description["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]


def test_every_number_of_a_request_has_both_bounds(description):
    def check(name, schema):
        kind = schema.get("type")
        if kind in ("integer", "number"):
            assert {"minimum", "exclusiveMinimum"} & schema.keys(), name
            assert {"maximum", "exclusiveMaximum"} & schema.keys(), name
        for option in schema.get("anyOf", []):
            check(name, option)
        if "items" in schema:
            check(name, schema["items"])

    for model in ("CompletionRequest", "ChatRequest", "TokenizeRequest", "DetokenizeRequest"):
        for name, schema in description["components"]["schemas"][model]["properties"].items():
            check(name, schema)


def test_answers_match_their_models(server):
    for response, model in (
        (server.complete(n=2), CompletionResponse),
        (server.complete(n=2, echo=True, logprobs=2), CompletionResponse),
        (server.chat(logprobs=True, top_logprobs=1), ChatResponse),
        (server.chat(), ChatResponse),
        (server.complete(n=99), ErrorResponse),
        (server.http.get("/v1/models"), ModelList),
    ):
        parsed = TypeAdapter(model).validate_json(response.content, strict=True)
        assert json.loads(parsed.model_dump_json()) == response.json()
