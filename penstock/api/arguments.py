"""Checks the arguments of `Engine.generate` once, on the caller's thread.

Every function raises `RequestError` and returns plain values, so no method of a caller's class runs later on an
engine's thread. Called by every implementation of `Engine.generate`.
"""

from __future__ import annotations

import dataclasses
import math
import time
import uuid
from dataclasses import dataclass
from typing import TypedDict

from penstock.api.prompt import Prompt, PromptInput, read_prompt
from penstock.errors import RequestError, shown
from penstock.generation import GenerationConfig, Params
from penstock.sampling import RequestPriority, SamplingParams
from penstock.values import integer, real, text

_LOWEST, _HIGHEST = min(RequestPriority), max(RequestPriority)
_PRIORITY_RULE = f"a RequestPriority ({', '.join(member.name for member in RequestPriority)})"


class RequestOptions(TypedDict, total=False):
    """Arguments of `Engine.generate` that `submit_request` and `submit_request_async` hand on."""

    request_id: str | None
    deadline: float | None
    ttft_deadline: float | None
    namespace: str
    adapter: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The checked arguments of one call. `arrival` and the deadlines are seconds on the monotonic clock."""

    prompt: PromptInput
    params: Params
    priority: RequestPriority
    arrival: float
    deadline: float
    ttft_deadline: float
    namespace: str
    adapter: str


def read_arguments(
    prompt: Prompt,
    params: Params = None,
    *,
    priority: RequestPriority = RequestPriority.NORMAL,
    deadline: float | None = None,
    ttft_deadline: float | None = None,
    namespace: str = "",
    adapter: str = "",
    callback: object = None,
) -> Arguments:
    """Check and copy the arguments of `Engine.generate`. The deadlines are given in seconds from now."""
    check_callback(callback)
    now = time.monotonic()
    return Arguments(
        read_prompt(prompt),
        check_params(params),
        check_priority(priority),
        now,
        math.inf if deadline is None else now + _seconds("deadline", deadline),
        math.inf if ttft_deadline is None else now + _seconds("ttft_deadline", ttft_deadline),
        text("namespace", namespace),
        "" if isinstance(adapter, str) and not adapter else text("adapter", adapter),
    )


def check_params(params: Params) -> Params:
    """Check the type of the parameters; copy a `GenerationConfig`, which is mutable, and so validate it again."""
    if isinstance(params, GenerationConfig):
        return dataclasses.replace(params)
    if params is not None and not isinstance(params, SamplingParams):
        text = f"params must be SamplingParams or GenerationConfig, got {type(params).__name__}"
        raise RequestError(text, parameter="params")
    return params


def check_priority(priority: RequestPriority) -> RequestPriority:
    """Return the priority class with that number."""
    number = integer("priority", priority, _LOWEST, _HIGHEST, _PRIORITY_RULE)
    return RequestPriority(number)


def _seconds(name: str, value: float) -> float:
    """Return the number. A deadline that has already passed is valid: the request then misses it."""
    return real(name, value, -math.inf, math.inf, "seconds from now, a number that a float can hold")


def check_id(request_id: str | None) -> str:
    """Return the request id, or a fresh one for None or ""."""
    return text("request_id", "" if request_id is None else request_id) or f"req-{uuid.uuid4().hex[:16]}"


def check_callback(callback: object) -> None:
    """Raise `RequestError` for a callback that is not callable; None means no callback."""
    if callback is not None and not callable(callback):
        raise RequestError(f"callback must be a function, got {shown(callback)}", parameter="callback")
