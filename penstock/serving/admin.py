"""`/admin`: drain, forget cached prefixes, abort.

Needs the admin key; without one in the settings there is no /admin.
"""

from __future__ import annotations

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from penstock.api.protocols import PrefixCaching
from penstock.serving.body import RequestModel, read_model
from penstock.serving.errors import HttpError
from penstock.serving.json_response import json_response
from penstock.serving.server import Server


class DrainRequest(RequestModel):
    """How long open requests may take; None is the setting `drain_timeout_s`."""

    timeout_s: float | None = Field(None, ge=0, le=86400)


class AbortRequest(RequestModel):
    """The id of a request: of an answer (`chatcmpl-...`), or the x-request-id of a call."""

    request_id: str


async def drain(server: Server, request: Request) -> Response:
    """Refuse new requests, wait for the open ones, abort the rest. The server stays up and not ready."""
    body = await read_model(request, DrainRequest, server.settings.max_body_bytes, default=b"{}")
    timeout_s = server.settings.drain_timeout_s if body.timeout_s is None else body.timeout_s
    return json_response({"drained": True, "num_aborted": await server.lifecycle.drain(timeout_s)})


async def resume(server: Server, request: Request) -> Response:
    """End a drain: be ready again."""
    server.lifecycle.resume()
    return json_response({"ready": True})


async def reset_prefix_cache(server: Server, request: Request) -> Response:
    """Reuse nothing computed so far."""
    if not isinstance(server.engine, PrefixCaching):
        raise HttpError(501, "this engine has no prefix cache to reset")
    server.engine.reset_prefix_cache()
    return json_response({"reset": True})


async def abort(server: Server, request: Request) -> Response:
    """End one request; its client is told."""
    body = await read_model(request, AbortRequest, server.settings.max_body_bytes)
    if not server.lifecycle.abort(body.request_id):
        raise HttpError(404, f"no open request {body.request_id[:200]!r}", code="not_found", param="request_id")
    return json_response({"aborted": body.request_id})
