"""`app`: the ASGI application around an engine.

Runs by itself under an ASGI server, where it starts the engine, or mounted in a program's own FastAPI or Starlette
application, which starts it. Never stops the engine: it belongs to the caller.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass

from anyio import to_thread
from fastapi import FastAPI
from fastapi.params import Depends
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from penstock import __version__
from penstock.api.protocols import Engine
from penstock.serving import adapters, admin, chat, completions, embeddings, health, models, tokens, weights
from penstock.serving.anthropic import endpoints as messages
from penstock.serving.anthropic.request import CountTokensRequest, MessagesRequest
from penstock.serving.chat_request import ChatRequest
from penstock.serving.completion_request import CompletionRequest
from penstock.serving.errors import HttpError, failure_of
from penstock.serving.gate import Gate, error_response
from penstock.serving.openapi import ANTHROPIC_ERROR, ErrorSchema, described, openapi_of
from penstock.serving.origins import LOCAL, allowed_origins
from penstock.serving.responses import endpoints as responses
from penstock.serving.responses.request import InputTokensRequest, ResponsesRequest
from penstock.serving.server import Server
from penstock.serving.settings import ServingSettings
from penstock.serving.tinker.service import TinkerService

Handler = Callable[[Server, Request], Awaitable[Response]]
_JSON = "application/json"
_JSON_OR_EVENTS = (_JSON, "text/event-stream")


@dataclass(frozen=True, slots=True)
class _Route:
    """An endpoint, its body's model, and the media types of its answers."""

    method: str
    path: str
    handler: Handler
    body: type[BaseModel] | None = None
    answers: tuple[str, ...] = (_JSON,)
    errors: ErrorSchema | None = None  # the schema of its errors; None is OpenAI's


ROUTES = (
    _Route("GET", "/health", health.health),
    _Route("GET", "/liveness", health.health),
    _Route("GET", "/ready", health.ready),
    _Route("GET", "/metrics", health.metrics, answers=("text/plain",)),
    _Route("GET", "/version", health.version),
    _Route("GET", "/v1/models", models.list_models),
    _Route("GET", "/v1/models/{model:path}", models.retrieve_model),
    _Route("POST", "/v1/chat/completions", chat.chat_completions, ChatRequest, _JSON_OR_EVENTS),
    _Route("POST", "/v1/completions", completions.completions, CompletionRequest, _JSON_OR_EVENTS),
    _Route("POST", "/v1/embeddings", embeddings.embeddings, embeddings.EmbeddingRequest),
    _Route("POST", "/v1/responses", responses.create_response, ResponsesRequest, _JSON_OR_EVENTS),
    _Route("POST", "/v1/responses/input_tokens", responses.count_input_tokens, InputTokensRequest),
    _Route("GET", "/v1/responses/{response_id}", responses.retrieve_response),
    _Route("DELETE", "/v1/responses/{response_id}", responses.delete_response),
    _Route("POST", "/v1/responses/{response_id}/cancel", responses.cancel_response),
    _Route("GET", "/v1/responses/{response_id}/input_items", responses.list_input_items),
    _Route("POST", "/v1/messages", messages.create_message, MessagesRequest, _JSON_OR_EVENTS, ANTHROPIC_ERROR),
    _Route("POST", "/v1/messages/count_tokens", messages.count_tokens, CountTokensRequest, errors=ANTHROPIC_ERROR),
    _Route("POST", "/tokenize", tokens.tokenize, tokens.TokenizeRequest),
    _Route("POST", "/detokenize", tokens.detokenize, tokens.DetokenizeRequest),
    _Route("POST", "/inference/v1/generate", tokens.generate, tokens.GenerateRequest, _JSON_OR_EVENTS),
    _Route("POST", "/admin/drain", admin.drain, admin.DrainRequest),
    _Route("POST", "/admin/resume", admin.resume),
    _Route("POST", "/admin/reset_prefix_cache", admin.reset_prefix_cache),
    _Route("POST", "/admin/abort", admin.abort, admin.AbortRequest),
    _Route("POST", "/update_weights", weights.update_weights, weights.UpdateRequest),
    *(
        _Route("POST", f"{prefix}/{verb}_lora_adapter", handler, body)
        for prefix in ("/v1", "")
        for verb, handler, body in (
            ("load", adapters.load_adapter, adapters.LoadAdapterRequest),
            ("unload", adapters.unload_adapter, adapters.UnloadAdapterRequest),
        )
    ),
    _Route("POST", "/pause", weights.pause),
    _Route("POST", "/resume", weights.resume),
    _Route("GET", "/is_paused", weights.is_paused),
    _Route("POST", "/sleep", weights.sleep),
    _Route("POST", "/wake_up", weights.wake_up),
    _Route("GET", "/is_sleeping", weights.is_sleeping),
)


Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[object]]


def app(
    engine: Engine,
    settings: ServingSettings | None = None,
    *,
    dependencies: Sequence[Depends] = (),
    lifespan: Lifespan | None = None,
    tinker: TinkerService | None = None,
) -> FastAPI:
    """An ASGI application that serves this engine, which other code may use at the same time.

    `dependencies` are FastAPI's, for every route. `lifespan(app)` is an async context manager around the life of the
    server, entered once the engine has started; not where the app is mounted. `tinker` adds the routes of the Tinker
    SDK, and is closed with the app. Raises `ConfigurationError` for a key that cannot be read.
    """
    server = Server(engine, settings or ServingSettings(), tinker)
    api = FastAPI(
        title="Penstock",
        version=__version__,
        dependencies=dependencies,
        lifespan=_lifespan_of(server, lifespan),
        docs_url=None,
        redoc_url=None,
        telemetry={"tracing": False, "logs": False},  # `tracing` says; older versions ignore the argument
    )
    api.state.server = server
    _add_routes(api, server, ROUTES if tinker is None else (*ROUTES, *_tinker_routes()))
    api.add_exception_handler(HTTPException, _answer_http_exception)
    api.add_middleware(Gate, server=server)
    _allow_browsers(api, server)
    return api


def _add_routes(api: FastAPI, server: Server, routes: Sequence[_Route]) -> None:
    for route in routes:
        _add_route(api, server, route)
    setattr(api, "openapi", openapi_of(api, [route.body for route in routes if route.body is not None]))  # noqa: B010


def _tinker_routes() -> list[_Route]:
    from penstock.serving.tinker.endpoints import ROUTES as tinker_routes  # needs the package tinker

    return [_Route(*row) for row in tinker_routes]


def _lifespan_of(server: Server, inner: Lifespan | None) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        await to_thread.run_sync(server.engine.start)  # not called where the app is mounted
        try:
            async with nullcontext() if inner is None else inner(api):
                yield
        finally:
            if server.tinker is not None:
                await server.tinker.close()

    return lifespan


def _add_route(api: FastAPI, server: Server, route: _Route) -> None:
    extra = described(route.path, route.body, route.answers, route.errors)
    name, endpoint = route.handler.__name__, _endpoint(server, route.handler)
    api.add_api_route(route.path, endpoint, methods=[route.method], name=name, openapi_extra=extra)


def _endpoint(server: Server, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await handler(server, request)

    return endpoint


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, and what a program's dependencies raise, in the API's own shape."""
    assert isinstance(error, HTTPException)
    refusal = HttpError(error.status_code, str(error.detail), code="not_found" if error.status_code == 404 else None)
    response = error_response(failure_of(refusal), request.scope)
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        response.headers["allow"] = ", ".join(_methods_at(request))
    return response


def _methods_at(request: Request) -> list[str]:
    """The methods of all routes with the path that fits first; the router names those of one route only."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    path = next((route.path for route in routes if route.matches(request.scope)[0] is not Match.NONE), None)
    methods = {method for route in routes if route.path == path for method in route.methods or ()}
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


def _allow_browsers(api: FastAPI, server: Server) -> None:
    """Cross-origin requests; a preflight is answered here and needs no key."""
    origins = allowed_origins(server.settings)
    api.add_middleware(
        CORSMiddleware,
        allow_origins=origins or (),
        allow_origin_regex=LOCAL if origins is None else None,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
    )
