"""`/v1/models` in Anthropic's shape, for clients that send the header `anthropic-version`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from starlette.requests import Request

from penstock.serving.errors import invalid
from penstock.serving.server import Server

_MAX_PAGE = 1000
_PAGE = 20


def all_names(server: Server) -> list[str]:
    """The names of the model, then those of its adapters."""
    return [*server.names, *server.adapters]


def model_info(server: Server, name: str) -> dict[str, object]:
    """One model."""
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": datetime.fromtimestamp(server.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": server.max_model_len,
        "max_tokens": server.max_model_len,
    }


def model_page(server: Server, request: Request) -> dict[str, object]:
    """The page of models that the query asks for. Raises `HttpError`."""
    query, names = request.query_params, all_names(server)
    limit = query.get("limit", str(_PAGE))
    if not limit.isdecimal() or len(limit) > 4 or not 1 <= int(limit) <= _MAX_PAGE:
        raise invalid(f"limit is a number from 1 to {_MAX_PAGE}", "limit")
    start = _position(names, query.get("after_id"), "after_id", -1) + 1
    end = _position(names, query.get("before_id"), "before_id", len(names))
    is_backward = "before_id" in query and "after_id" not in query
    page = names[start:end][-int(limit) :] if is_backward else names[start:end][: int(limit)]
    return {
        "data": [model_info(server, name) for name in page],
        "has_more": len(page) < len(names[start:end]),
        "first_id": page[0] if page else None,
        "last_id": page[-1] if page else None,
    }


def _position(names: Sequence[str], name: str | None, param: str, default: int) -> int:
    if name is None:
        return default
    if name not in names:
        raise invalid(f"{param} is not the id of a model", param)
    return names.index(name)
