"""`Gate`: what every HTTP request passes on its way in and out, as pure ASGI middleware.

Gives it an id, refuses it without a key (all paths but those in `OPEN_PATHS`), counts open calls, turns exceptions into
error responses of the right API, and logs one line without any of its content.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.errors import described
from penstock.serving import adapters, weights
from penstock.serving.anthropic.envelope import anthropic_envelope
from penstock.serving.auth import Client
from penstock.serving.errors import Envelope, Failure, failure_of, openai_envelope
from penstock.serving.json_response import json_response
from penstock.serving.origins import check_origin
from penstock.serving.server import Server
from penstock.serving.tracing import Outcome

OPEN_PATHS = frozenset({"/health", "/ready"})
_ADMIN_PATHS = weights.PATHS | adapters.PATHS
_VALID_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_CANCELLATION = re.compile("/v1/responses/[^/]+/cancel")  # allowed while what it cancels fills the limit
_MESSAGES, _MODELS = "/v1/messages", "/v1/models"


@dataclass(slots=True)
class Call:
    """One HTTP request. Endpoints add `facts` to its line in the log."""

    id: str
    client: Client
    facts: dict[str, object] = field(default_factory=dict)


def call_of(scope: Mapping[str, object]) -> Call:
    """The call that the gate put into the scope."""
    call = scope["penstock.call"]
    assert isinstance(call, Call)
    return call


def route_path(scope: Scope) -> str:
    """The path below the prefix under which the app is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) or "/" if path.removeprefix(root)[:1] in ("", "/") else path


def is_anthropic(headers: Mapping[str, str]) -> bool:
    """Whether the client speaks Anthropic's API, at paths that both APIs have."""
    return "anthropic-version" in headers


def envelope_of(scope: Scope) -> Envelope:
    """The shape of errors of the API that a request belongs to."""
    path = f"{route_path(scope)}/"
    is_shared = path.startswith(f"{_MODELS}/") and is_anthropic(Headers(scope=scope))
    return anthropic_envelope if is_shared or path.startswith(f"{_MESSAGES}/") else openai_envelope


def error_response(failure: Failure, scope: Scope) -> Response:
    """A failure as the response that its API prescribes."""
    return json_response(envelope_of(scope)(failure), failure.status, failure.headers)


class Gate:
    """The outermost middleware of the app, except for CORS."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app = app
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        answer = _Answer(send, scope["method"], _request_id(headers))
        if answer.method == "HEAD":  # a GET whose body the HTTP server leaves out
            scope = {**scope, "method": "GET"}
        with self._server.tracing.request(answer.method, headers) as outcome:
            await self._serve(scope, headers, receive, answer, outcome)

    async def _serve(self, scope: Scope, headers: Headers, receive: Receive, answer: _Answer, outcome: Outcome) -> None:
        path = route_path(scope)
        begin_s, client_name, facts = time.perf_counter(), "", {}
        try:
            with ExitStack() as stack:
                client = self._client(path, headers)
                client_name = client.name
                self._admit(scope, path, client, stack)
                call = scope["penstock.call"] = Call(answer.request_id, client)
                facts = call.facts
                if scope["method"] == "POST":
                    await self._server.load()
                await self._app(scope, receive, answer)
        except Exception as error:
            await self._fail(error, scope, receive, answer)
        finally:
            outcome.route, outcome.status, outcome.facts = _route_of(scope), answer.status, facts
            self._server.metrics.record_response(outcome.route, answer.status)
            duration_s = round(time.perf_counter() - begin_s, 6)
            self._server.log.info(
                "request",
                **{"request_id": answer.request_id, "method": answer.method, "path": outcome.route},
                **{"status": answer.status, "key": client_name, "duration_s": duration_s, **facts},
            )

    def _client(self, path: str, headers: Headers) -> Client:
        """Who sends the request. Raises `HttpError`."""
        keys = self._server.keys
        if _is_admins(path):
            keys.check_admin(headers)
            return Client()
        client = Client() if path in OPEN_PATHS else keys.client(headers)
        check_origin(self._server.settings, headers)
        return client

    def _admit(self, scope: Scope, path: str, client: Client, stack: ExitStack) -> None:
        """Count a request that generates as open. Raises `HttpError`."""
        if scope["method"] == "POST" and not (_is_admins(path) or _CANCELLATION.fullmatch(path)):
            stack.enter_context(client.admitted())
            stack.enter_context(self._server.lifecycle.call())

    async def _fail(self, error: Exception, scope: Scope, receive: Receive, answer: _Answer) -> None:
        failure = failure_of(error, scope)
        if failure.status >= 500:
            self._server.log.error(
                "request failed",
                request_id=answer.request_id,
                error=described(error),
                exc_info=failure.status == 500,
            )
        if answer.status:
            raise error
        await error_response(failure, scope)(scope, receive, answer)


class _Answer:
    """ASGI's `send`, which notes the status and adds the request's id."""

    def __init__(self, send: Send, method: str, request_id: str) -> None:
        self.method = method
        self.request_id = request_id
        self.status = 0
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = headers["request-id"] = self.request_id  # OpenAI's name, and Anthropic's
        await self._send(message)


def _request_id(headers: Headers) -> str:
    presented = headers.get("x-request-id", "")
    return presented if _VALID_ID.fullmatch(presented) else f"req-{uuid.uuid4().hex}"


def _is_admins(path: str) -> bool:
    return path.startswith("/admin/") or path in _ADMIN_PATHS


def _route_of(scope: Scope) -> str:
    """The route's pattern, so that made-up paths neither fill the metrics nor reach the log.

    A request that was refused before it was routed has the route of its path, if there is one without parameters.
    """
    if (route := scope.get("route")) is not None:
        return str(getattr(route, "path", "unknown"))
    path = route_path(scope)
    return path if any(getattr(route, "path", None) == path for route in scope["app"].routes) else "unknown"
