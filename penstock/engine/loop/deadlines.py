"""`DeadlineTimers`: one timer per request with a deadline, so that it ends in time whatever step is running.

A request may pass its deadline while its prompt is encoded, in the queue, or in the middle of a long step. Owns the
timers and nothing else; belongs to the engine's loop. Called by `EngineCore`.
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
        """Watch a request; free for one without a deadline."""
        deadline = _next_deadline(request)
        if deadline < math.inf:
            delay = max(0.0, deadline - self._clock())
            self._timers[request.id] = asyncio.get_running_loop().call_later(delay, self._check, request)

    def clear(self, request_id: str) -> None:
        """Stop watching."""
        if (timer := self._timers.pop(request_id, None)) is not None:
            timer.cancel()

    def _check(self, request: Request) -> None:
        """Loops round times, so a timer may fire early; after the first token, the other deadline counts."""
        if self._clock() < _next_deadline(request):
            self.set(request)
        else:
            self._expired(request)


def _next_deadline(request: Request) -> float:
    has_begun = request.first_token is not None
    return request.deadline if has_begun else min(request.deadline, request.ttft_deadline)
