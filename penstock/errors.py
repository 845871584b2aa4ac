"""Every error Penstock raises on purpose.

    PenstockError
    ├── ConfigurationError (ValueError)     bad engine configuration, unknown key, unusable model
    │   └── PackageMissing (ImportError)    an optional package is not installed
    ├── RequestError (ValueError)           bad parameters, empty prompt, unknown adapter
    │   ├── RequestTooLarge                 can never fit; names prompt, max_tokens and limit
    │   └── GrammarError                    schema, grammar or regular expression refused
    ├── EngineOverloaded (RuntimeError)     the request queue is full; has retry_after_s
    ├── DeadlineExceeded (TimeoutError)     has the partial output
    ├── RequestAborted                      has the partial output
    ├── EngineClosed (RuntimeError)         the engine was stopped; has the partial output
    ├── EngineStateError (RuntimeError)     out of order: paused twice, two updates at once, not asleep
    ├── WeightsError (ValueError)           weights that do not fit; is_mixed: the engine must be closed
    └── ExecutionError (RuntimeError)       the forward pass failed
        └── OutOfMemory                     "CUDA out of memory" or "out of memory", and what to change

An error message states what is wrong and what the caller can change. What the engine's settings can change is a note of
the exception (`with_hint`): tracebacks show it, and a web service leaves it out by answering with `str(error)`.
`assert` is only for bugs in this package. Callers' values and exceptions enter a message through `shown`, `text_of` and
`described`, which never fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Self

from penstock.outputs import RequestOutput

_MAX_CHARACTERS = 2000  # of a caller's value in a message


def shown(value: object) -> str:
    """`repr(value)`, truncated. If `__repr__` fails, the type's name in angle brackets."""
    return _safe_text(repr, value) or f"<{type(value).__name__}>"


def text_of(error: BaseException) -> str:
    """`str(error)`, truncated; the name of its type if that is empty or fails."""
    return _safe_text(str, error) or type(error).__name__


def described(error: BaseException) -> str:
    """`ValueError: message`, truncated; the type's name alone if the message is empty or `__str__` fails."""
    message = _safe_text(str, error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _safe_text(render: Callable[[object], str], thing: object) -> str:
    """The result of `render`, truncated; "" if it fails, even with `SystemExit` or on too many digits."""
    try:
        text = str.__str__(render(thing))
    except BaseException:
        return ""
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."


class PenstockError(Exception):
    """Base of every error that Penstock raises on purpose. `http_status` is what a web service answers with it."""

    http_status: ClassVar[int] = 500

    def with_hint(self, hint: str) -> Self:
        """Add a note that says what to change in the engine's settings; "" adds nothing."""
        if hint:
            self.add_note(hint)
        return self


class ConfigurationError(PenstockError, ValueError):
    """The engine cannot be built with this configuration."""


class PackageMissing(ConfigurationError, ImportError):
    """An optional package is not installed; names how to install it."""


class RequestError(PenstockError, ValueError):
    """One request is invalid; no other is affected. `parameter` is the name of what is wrong, None if that is unknown.

    Names are those of `generate` and of the parameters: "prompt", "temperature".
    """

    http_status = 400

    def __init__(self, *args: object, parameter: str | None = None) -> None:
        super().__init__(*args)
        self.parameter = parameter

    def concerns(self, parameter: str) -> None:
        """Note that this is about a parameter, unless it names another one."""
        self.parameter = self.parameter or parameter


@contextmanager
def concerning(parameter: str) -> Iterator[None]:
    """A block whose `RequestError`s are about this parameter, unless they name another one."""
    try:
        yield
    except RequestError as error:
        error.concerns(parameter)
        raise


class RequestTooLarge(RequestError):
    """The request can never fit, however long it waits."""


class GrammarError(RequestError):
    """A schema, grammar or regular expression was refused, or its work limit ran out; names the reason."""


class EngineOverloaded(PenstockError, RuntimeError):
    """The waiting queue is full. `retry_after_s` is an estimate in seconds."""

    http_status = 429

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class _Partial(PenstockError):
    """An early end with a partial result: `output` is the `RequestOutput` so far, or None."""

    def __init__(self, message: str, output: RequestOutput | None = None) -> None:
        super().__init__(message)
        self.output = output


class DeadlineExceeded(_Partial, TimeoutError):
    """A deadline passed; `output` holds what was generated until then."""

    http_status = 504


class RequestAborted(_Partial):
    """The request was cancelled; `output` holds what was generated until then."""


class EngineClosed(_Partial, RuntimeError):
    """The engine was stopped, or its thread failed; `output` holds what a request that this ended had generated."""

    http_status = 503


class EngineStateError(PenstockError, RuntimeError):
    """An update, pause, resume, sleep or wake that the engine's present state does not allow. Nothing was changed.

    Also for what an update of the weights has overlapped: a score with gradients, a block of `reading_weights`.
    """

    http_status = 409


class WeightsError(PenstockError, ValueError):
    """New weights could not be taken over.

    The old weights are in force, unless `is_mixed`: then old and new ones are mixed, and the engine must be closed.
    """

    http_status = 400

    def __init__(self, message: str, *, is_mixed: bool = False) -> None:
        super().__init__(message)
        self.is_mixed = is_mixed


class ExecutionError(PenstockError, RuntimeError):
    """The model's forward pass failed; the engine continues to serve."""


class OutOfMemory(ExecutionError):
    """Memory ran out during a step; the message names the setting to change."""
