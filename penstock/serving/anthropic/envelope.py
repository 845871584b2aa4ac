"""Errors in Anthropic's shape."""

from __future__ import annotations

from penstock.serving.errors import Failure
from penstock.serving.sse import named_frame

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


def anthropic_envelope(failure: Failure) -> dict[str, object]:
    """The body of an error response, and the data of an error in a stream."""
    kind = _TYPES.get(failure.status, "api_error" if failure.status >= 500 else "invalid_request_error")
    if failure.code == "engine_overloaded":
        kind = "overloaded_error"
    return {"type": "error", "error": {"type": kind, "message": failure.message}}


def failure_frame(failure: Failure) -> bytes:
    """The last event of a stream that fails."""
    return named_frame("error", anthropic_envelope(failure))
