"""Errors as HTTP answers: `failure_of` gives an error's status, code and headers; an envelope gives it an API's shape.

A request's own fault is always 4xx, because clients retry 5xx. `HttpError` is for what only a server refuses. Unknown
exceptions become a 500 that tells nothing of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from starlette.types import Scope

from penstock.errors import (
    DeadlineExceeded,
    EngineClosed,
    EngineOverloaded,
    EngineStateError,
    ExecutionError,
    GrammarError,
    PenstockError,
    RequestAborted,
    RequestError,
    RequestTooLarge,
    WeightsError,
    text_of,
)
from penstock.serving.field_names import field_of

CLIENT_CLOSED = 499


@dataclass(frozen=True, slots=True)
class Failure:
    """What an error response says. `type` and `code` are OpenAI's words."""

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


Envelope = Callable[[Failure], dict[str, object]]


class HttpError(PenstockError):
    """A request that the server refuses before the engine sees it."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after_s: float = 0
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s


def invalid(message: str, param: str | None = None, code: str | None = None) -> HttpError:
    """A 400."""
    return HttpError(400, message, code=code, param=param)


def failure_of(error: BaseException, scope: Scope | None = None) -> Failure:
    """The answer to an error; `scope` is that of the request, whose field it names."""
    if isinstance(error, HttpError):
        headers = _retry_after(error.retry_after_s) if error.retry_after_s else {}
        if error.status == 401:
            headers = {"www-authenticate": "Bearer"}
        return Failure(error.status, text_of(error), _type_of(error.status), error.code, error.param, headers)
    if isinstance(error, WeightsError) and error.is_mixed:
        return Failure(500, text_of(error), "server_error", "mixed_weights")
    for kind, (status, code) in _ANSWERS.items():
        if isinstance(error, kind):
            headers = _retry_after(error.retry_after_s) if isinstance(error, EngineOverloaded) else {}
            if isinstance(error, DeadlineExceeded):
                headers = {"x-should-retry": "false"}
            param = field_of(scope, error.parameter) if isinstance(error, RequestError) else None
            return Failure(status, text_of(error), _type_of(status), code, param, headers)
    return Failure(500, "internal error: the server's log has the details", "server_error")


def openai_envelope(failure: Failure) -> dict[str, object]:
    """OpenAI's nested error."""
    error = {"message": failure.message, "type": failure.type, "param": failure.param, "code": failure.code}
    return {"error": error}


# The first match counts: subclasses stand before their bases.
_ANSWERS: Mapping[type[PenstockError], tuple[int, str | None]] = {
    RequestTooLarge: (400, "context_length_exceeded"),
    GrammarError: (400, "invalid_grammar"),
    RequestError: (400, None),
    EngineOverloaded: (429, "engine_overloaded"),
    DeadlineExceeded: (408, "deadline_exceeded"),  # the request set it itself
    RequestAborted: (CLIENT_CLOSED, "request_aborted"),
    EngineClosed: (503, "engine_closed"),
    EngineStateError: (409, "engine_state"),
    WeightsError: (400, "invalid_weights"),
    ExecutionError: (500, "execution_error"),
}

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    408: "timeout",
}


def _type_of(status: int) -> str:
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def _retry_after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(max(1, math.ceil(min(seconds, 3600.0))))}
