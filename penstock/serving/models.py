"""`/v1/models`: the names under which the model and its adapters are served, and how long sequences may be."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from penstock.serving.anthropic.models import all_names, model_info, model_page
from penstock.serving.gate import is_anthropic
from penstock.serving.json_response import json_response
from penstock.serving.server import Server


async def list_models(server: Server, request: Request) -> Response:
    """All names."""
    if is_anthropic(request.headers):
        return json_response(model_page(server, request))
    return json_response({"object": "list", "data": [_model(server, name) for name in all_names(server)]})


async def retrieve_model(server: Server, request: Request) -> Response:
    """One name, which may contain slashes."""
    name = server.check_model(str(request.path_params["model"]))
    return json_response(model_info(server, name) if is_anthropic(request.headers) else _model(server, name))


def _model(server: Server, name: str) -> dict[str, object]:
    adapter = server.adapter_of(name)
    return {
        "id": name,
        "object": "model",
        "created": server.created,
        "owned_by": "penstock",
        "root": adapter or server.names[0],
        "parent": server.names[0] if adapter else None,
        "max_model_len": server.max_model_len,
        "context_length": server.max_model_len,
    }
