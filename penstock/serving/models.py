"""`/v1/models`: the names under which the model is served, and how long its sequences may be."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from penstock.serving.anthropic.models import model_info, model_page
from penstock.serving.gate import is_anthropic
from penstock.serving.json_response import json_response
from penstock.serving.server import Server


async def list_models(server: Server, request: Request) -> Response:
    """All names."""
    if is_anthropic(request.headers):
        return json_response(model_page(server, request))
    return json_response({"object": "list", "data": [_model(server, name) for name in server.names]})


async def retrieve_model(server: Server, request: Request) -> Response:
    """One name, which may contain slashes."""
    name = server.check_model(str(request.path_params["model"]))
    return json_response(model_info(server, name) if is_anthropic(request.headers) else _model(server, name))


def _model(server: Server, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": server.created,
        "owned_by": "penstock",
        "root": server.names[0],
        "parent": None,
        "max_model_len": server.max_model_len,
        "context_length": server.max_model_len,
    }
