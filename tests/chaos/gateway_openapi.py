"""The gateway as an OpenAPI document, made of the models that check requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic.json_schema import models_json_schema

from agent_lightning.serving.dialects.base import Dialect
from agent_lightning.serving.paths import GOOGLE

_ROOT: Final = "/rollout/{rollout}/attempt/{attempt}/{secret}/{agent}/"
_PARAMETERS: Final[Mapping[str, Any]] = {
    "rollout": {"type": "string", "pattern": "^(train|val)-[0-9]+-[0-9]+$"},
    "attempt": {"type": "integer", "minimum": 0},
    "secret": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    "agent": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[^/]+$"},
}
_REFUSALS: Final[Mapping[str, str]] = {
    "400": "not a request of this format, or one that cannot be answered; no retry helps",
    "403": "the secret is not that of this attempt",
    "404": "no such path",
    "409": "the rollout or this attempt of it has ended",
    "413": "larger than a request may be",
    "429": "this attempt has too many bytes in flight; try again",
    "500": "the engine failed; try again",
}
_ANY: Final[Mapping[str, Any]] = {"type": "object"}


def describe(dialects: Mapping[str, Dialect]) -> dict[str, Any]:
    """The OpenAPI document; `dialects` by the ends of their paths. The paths are as the clients of a format write them:
    Google's actions follow the model's name."""
    references, schemas = models_json_schema(
        [(dialect.request, "validation") for dialect in dialects.values()], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {
        _ROOT + (f"v1beta/models/policy:{end}" if end in GOOGLE else f"v1/{end}"): _post(
            {"application/json": {"schema": references[dialect.request, "validation"]}}, streams=True
        )
        for end, dialect in dialects.items()
    }
    messages = paths[f"{_ROOT}v1/messages"]["post"]["requestBody"]["content"]
    paths[f"{_ROOT}v1/messages/count_tokens"] = _post(messages)
    traces = {"application/json": {"schema": _ANY}, "application/x-protobuf": {"schema": {"type": "string"}}}
    paths[f"{_ROOT}v1/traces"] = _post(traces)
    paths[f"{_ROOT}v1/traces"]["post"]["responses"]["200"]["content"] = traces
    paths[f"{_ROOT}v1/models"] = {"get": _operation()}
    paths["/health"] = {"get": {"responses": {"200": _answer("alive")}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Agent Lightning's gateway", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }


def _post(content: Mapping[str, Any], *, streams: bool = False) -> dict[str, Any]:
    operation = {"requestBody": {"required": True, "content": content}, **_operation()}
    if streams:
        event = {"type": "object", "required": ["data"]}
        operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": event}
    return {"post": operation}


def _operation() -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": schema} for name, schema in _PARAMETERS.items()
    ]
    answers = {code: _answer(text) for code, text in _REFUSALS.items()}
    return {"parameters": parameters, "responses": {"200": _answer("the answer, as the format has it"), **answers}}


def _answer(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _ANY}}}
