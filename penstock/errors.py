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

Errors say what was wrong and what to change. `assert` is only for bugs of our own.
"""

from __future__ import annotations

from typing import Any


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

    def __init__(self, message: str, output: Any = None) -> None:
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
