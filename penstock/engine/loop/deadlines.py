"""`DeadlineTimers`: one timer per request with a deadline, so that it ends in time during any step.

A deadline may pass while the prompt is encoded, in the queue, or in the middle of a long step. Owns only the timers;
belongs to the engine's event loop. Called by `EngineCore`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from penstock.engine.requests.request import Request


class DeadlineTimers:
    """Calls `expired(request)` once a request's deadline has passed; times are seconds on `clock`."""

    def __init__(self, clock: Callable[[], float], expired: Callable[[Request], None]) -> None:
        self._clock = clock
        self._expired = expired
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def set(self, request: Request) -> None:
        """Start a timer for a request; does nothing if it has no deadline."""
        deadline = _next_deadline(request)
        if deadline < math.inf:
            delay = max(0.0, deadline - self._clock())
            self._timers[request.id] = asyncio.get_running_loop().call_later(delay, self._check, request)

    def clear(self, request_id: str) -> None:
        """Cancel the timer of a request."""
        if (timer := self._timers.pop(request_id, None)) is not None:
            timer.cancel()

    def _check(self, request: Request) -> None:
        """Expire the request, or wait again: loops round times, and the first token changes the deadline."""
        if self._clock() < _next_deadline(request):
            self.set(request)
        else:
            self._expired(request)


def _next_deadline(request: Request) -> float:
    has_begun = request.first_token is not None
    return request.deadline if has_begun else min(request.deadline, request.ttft_deadline)
