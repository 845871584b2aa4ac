"""`/health`, `/ready`, `/metrics` and `/version`.

Healthy: the engine's thread works. Ready: it is loaded, not draining, and does not stall.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from penstock import __version__
from penstock.serving.json_response import json_response
from penstock.serving.readiness import status_of
from penstock.serving.server import Server


async def health(server: Server, request: Request) -> Response:
    """200 unless the engine has failed or was stopped."""
    status = status_of(server.stats())
    return json_response({"status": status}, 503 if status in ("failed", "stopped") else 200)


async def version(server: Server, request: Request) -> Response:
    """The package's version."""
    return json_response({"version": __version__})


async def metrics(server: Server, request: Request) -> Response:
    """Prometheus' text format."""
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def ready(server: Server, request: Request) -> Response:
    """200 if new requests are welcome."""
    reason = server.readiness.reason(server.stats()) if server.lifecycle.is_ready else "draining"
    return json_response({"status": reason or "ready"}, 503 if reason else 200)
