"""What every endpoint of the service needs of a request: the service, and who asks; how its routes are listed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from penstock.serving.gate import call_of
from penstock.serving.server import Server
from penstock.serving.tinker.service import TinkerService

PREFIX = "/api/v1"
# Method, path, handler, and the model of a JSON body.
Routes = tuple[tuple[str, str, Callable[[Server, Request], Awaitable[Response]], type[BaseModel] | None], ...]


def service_of(server: Server) -> TinkerService:
    """The service; the routes are only there with it."""
    assert server.tinker is not None
    return server.tinker


def owner_of(request: Request) -> str:
    """The name of the key, which owns sessions and saved weights; "" where there are no keys."""
    return call_of(request.scope).client.name
