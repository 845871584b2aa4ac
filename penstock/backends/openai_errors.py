"""The package's errors for those of the `openai` library. Called by what talks to OpenAI-compatible servers."""

from __future__ import annotations

import asyncio

import openai

from penstock.errors import (
    EngineClosed,
    EngineOverloaded,
    ExecutionError,
    PenstockError,
    RequestError,
    RequestTooLarge,
    described,
)


def penstock_error(error: BaseException, url: str) -> PenstockError:
    """The package's error for one that was raised while the server at `url` was called."""
    if isinstance(error, PenstockError):
        return error
    if isinstance(error, openai.RateLimitError):
        pause = error.response.headers.get("retry-after", "")
        return EngineOverloaded(f"{url} is overloaded: {error.message}", float(pause) if pause.isdigit() else 1.0)
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return RequestError(f"{url} requires a valid key: pass api_key ({error.message})")
    if isinstance(error, openai.APIStatusError) and 400 <= error.status_code < 500:
        kind = RequestTooLarge if error.code == "context_length_exceeded" else RequestError
        return kind(f"{url} refused the request: {error.message}")
    if isinstance(error, asyncio.CancelledError):
        return EngineClosed("the engine was stopped")
    return ExecutionError(f"{url} failed: {described(error)}")
