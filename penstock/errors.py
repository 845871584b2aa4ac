"""Every error Penstock raises on purpose.

    PenstockError
    ├── ConfigurationError (ValueError)     bad engine configuration, unknown key, unusable model
    ├── RequestError (ValueError)           bad parameters, empty prompt, unknown adapter
    │   ├── RequestTooLarge                 can never fit: says prompt, max_tokens, limit
    │   └── GrammarError                    schema or regular expression refused, with the reason
    ├── EngineOverloaded (RuntimeError)     the request queue is full; carries retry_after_s
    ├── DeadlineExceeded (TimeoutError)     carries the partial output
    ├── RequestAborted                      carries the partial output
    ├── EngineClosed (RuntimeError)         the engine was stopped
    └── ExecutionError (RuntimeError)       the forward pass failed
        └── OutOfMemory                     says "CUDA out of memory" or "out of memory", and what to change

Errors say what was wrong and what to change. `assert` is only for bugs of our own. What callers' values and errors say
of themselves enters a message through `shown`, `text_of` and `described`, which never fail.
"""

from __future__ import annotations

from collections.abc import Callable

from penstock.outputs import RequestOutput

_MAX_CHARACTERS = 2000  # characters of a caller's value in a message


def shown(value: object) -> str:
    """`repr(value)`, cut to what a message has room for. A value whose `__repr__` fails is named by its type."""
    return _safe_text(repr, value) or f"<{type(value).__name__}>"


def text_of(error: BaseException) -> str:
    """`str(error)`, cut; the name of its type where that is empty or fails."""
    return _safe_text(str, error) or type(error).__name__


def described(error: BaseException) -> str:
    """`ValueError: what it says`, cut; the name alone where it says nothing or its `__str__` fails."""
    message = _safe_text(str, error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _safe_text(render: Callable[[object], str], thing: object) -> str:
    """What `word` says of a thing; nothing where it fails, be it with a `SystemExit` or for too many digits."""
    try:
        text = str.__str__(render(thing))
    except BaseException:
        return ""
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."


class PenstockError(Exception):
    """Base of every error that Penstock raises on purpose."""


class ConfigurationError(PenstockError, ValueError):
    """The engine cannot be built as asked."""


class RequestError(PenstockError, ValueError):
    """One request is wrong; nothing else is affected."""


class RequestTooLarge(RequestError):
    """The request could never fit, however long it waited."""


class GrammarError(RequestError):
    """A schema, grammar or regular expression was refused."""


class EngineOverloaded(PenstockError, RuntimeError):
    """The waiting queue is full. `retry_after_s` is an estimate in seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class _Partial(PenstockError):
    """An ending that still has something to give: `output` is the `RequestOutput` so far, or None."""

    def __init__(self, message: str, output: RequestOutput | None = None) -> None:
        super().__init__(message)
        self.output = output


class DeadlineExceeded(_Partial, TimeoutError):
    """A deadline passed; `output` carries what was generated until then."""


class RequestAborted(_Partial):
    """The request was cancelled; `output` carries what was generated until then."""


class EngineClosed(PenstockError, RuntimeError):
    """The engine was stopped, or its thread died."""


class ExecutionError(PenstockError, RuntimeError):
    """The model's forward pass failed; the engine goes on serving."""


class OutOfMemory(ExecutionError):
    """Memory ran out during a step; the message says what to change."""
