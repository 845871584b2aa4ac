"""`app`: the ASGI application around an engine.

Runs by itself under an ASGI server, or mounted in a program's own FastAPI or Starlette application. Owns no engine: the
caller starts and stops it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from fastapi import FastAPI
from fastapi.params import Depends
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from penstock import __version__
from penstock.api.protocols import Engine
from penstock.serving import chat, completions, health, models
from penstock.serving.errors import HttpError, failure_of
from penstock.serving.gate import Gate, error_response, route_path
from penstock.serving.server import Server
from penstock.serving.settings import ServingSettings

Handler = Callable[[Server, Request], Awaitable[Response]]
_LOCAL = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"

ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/health", health.health),
    ("GET", "/ready", health.ready),
    ("GET", "/metrics", health.metrics),
    ("GET", "/version", health.version),
    ("GET", "/v1/models", models.list_models),
    ("GET", "/v1/models/{model:path}", models.retrieve_model),
    ("POST", "/v1/chat/completions", chat.chat_completions),
    ("POST", "/v1/completions", completions.completions),
)


def app(engine: Engine, settings: ServingSettings | None = None, *, dependencies: Sequence[Depends] = ()) -> FastAPI:
    """An ASGI application that serves this engine, which other code may use at the same time.

    `dependencies` are FastAPI's, for every route. Raises `ConfigurationError` for a key that cannot be read.
    """
    server = Server(engine, settings or ServingSettings())
    api = FastAPI(title="Penstock", version=__version__, dependencies=dependencies, docs_url=None, redoc_url=None)
    api.state.server = server
    for method, path, handler in ROUTES:
        api.add_api_route(path, _endpoint(server, handler), methods=[method], name=handler.__name__)
    api.add_exception_handler(HTTPException, _answer_http_exception)
    api.add_middleware(Gate, server=server)
    _allow_browsers(api, server)
    return api


def _endpoint(server: Server, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await handler(server, request)

    return endpoint


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, and what a program's dependencies raise, in the API's own shape."""
    assert isinstance(error, HTTPException)
    refusal = HttpError(error.status_code, str(error.detail), code="not_found" if error.status_code == 404 else None)
    response = error_response(failure_of(refusal), route_path(request.scope))
    response.headers.update(error.headers or {})
    return response


def _allow_browsers(api: FastAPI, server: Server) -> None:
    """Cross-origin requests; a preflight is answered here and needs no key."""
    origins = server.settings.cors_origins
    if origins is None and server.settings.api_keys:
        origins = ("*",)
    api.add_middleware(
        CORSMiddleware,
        allow_origins=origins or (),
        allow_origin_regex=_LOCAL if origins is None else None,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
    )
