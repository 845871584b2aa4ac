"""The OpenAPI document: FastAPI's, completed by the bodies, which the endpoints read and validate themselves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"
_JSON = "application/json"
_PARAMETER = re.compile(r"\{(\w+)")
ErrorSchema = Mapping[str, object]
_OPENAI_ERROR: ErrorSchema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ANTHROPIC_ERROR: ErrorSchema = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}


def described(
    path: str, model: type[BaseModel] | None, media_types: Sequence[str], error_schema: ErrorSchema | None = None
) -> dict[str, Any]:
    """What FastAPI adds to an operation: the parameter in its path, its body, what it answers, and the errors."""
    errors = {"description": "An error.", "content": {_JSON: {"schema": error_schema or _OPENAI_ERROR}}}
    answer = {"description": "The answer.", "content": {media_type: {} for media_type in media_types}}
    extra: dict[str, Any] = {"responses": {"200": answer, "4XX": errors, "5XX": errors}}
    if parameter := _PARAMETER.search(path):
        schema = {"type": "string"}
        extra["parameters"] = [{"name": parameter[1], "in": "path", "required": True, "schema": schema}]
    if model is not None:
        reference = {"schema": {"$ref": _REF.format(model=model.__name__)}}
        extra["requestBody"] = {"required": True, "content": {_JSON: reference}}
    return extra


def openapi_of(api: FastAPI, models: Sequence[type[BaseModel]]) -> Callable[[], dict[str, Any]]:
    """FastAPI's `openapi` method, with the schemas of these models among the components."""

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            schema = get_openapi(title=api.title, version=api.version, routes=api.routes)
            _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions.get("$defs", {}))
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            api.openapi_schema = schema
        return api.openapi_schema

    return openapi
