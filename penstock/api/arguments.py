"""The arguments of `Engine.generate` beside the prompt, checked on the caller's thread.

Every function raises `RequestError` and returns plain values, of which no method of a caller's class runs later.
"""

from __future__ import annotations

import dataclasses
import math

from penstock.errors import RequestError, shown
from penstock.generation import GenerationConfig, Params
from penstock.sampling import RequestPriority, SamplingParams
from penstock.values import integer, real, text

_LOWEST, _HIGHEST = min(RequestPriority), max(RequestPriority)
_PRIORITY_RULE = f"a RequestPriority ({', '.join(member.name for member in RequestPriority)})"


def check_params(params: Params) -> Params:
    """The parameters as they are now: a `GenerationConfig` can be assigned to, so it is copied and checked again."""
    if isinstance(params, GenerationConfig):
        return dataclasses.replace(params)
    if params is not None and not isinstance(params, SamplingParams):
        raise RequestError(f"params must be SamplingParams or GenerationConfig, got {type(params).__name__}")
    return params


def check_priority(priority: RequestPriority) -> RequestPriority:
    """The class of that number."""
    number = integer("priority", priority, _LOWEST, _HIGHEST, _PRIORITY_RULE)
    return RequestPriority(number)


def check_seconds(name: str, value: float | None) -> float:
    """The number; infinity for None. A time that has passed already is a missed deadline, not a mistake."""
    if value is None:
        return math.inf
    return real(name, value, -math.inf, math.inf, "seconds from now, a number that a float can hold")


def check_id(request_id: object) -> str:
    """The id of a request."""
    return text("request_id", request_id)


def check_callback(callback: object) -> None:
    """Refuses what cannot be called; None is no callback."""
    if callback is not None and not callable(callback):
        raise RequestError(f"callback must be a function, got {shown(callback)}")
