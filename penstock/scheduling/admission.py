"""`Admission`: the door to the waiting queue, counted before any work is done for a request.

Owns how many requests and prompt tokens wait. Never holds a request. Called by callers' threads (`reserve`, `adjust`)
and by the engine's (`release`): the one place below the engine with a lock, held for a few additions.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from penstock.config import EngineConfig
from penstock.errors import EngineOverloaded

_WINDOW = 64  # releases that the observed rate is taken over
_RETRY_S = (0.05, 60.0)  # shortest and longest honest advice


class Admission:
    """Limits are read from `config` at every call, so an assignment takes effect at once."""

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._lock = threading.Lock()
        self._requests = 0
        self._tokens = 0
        self._releases: deque[tuple[float, int, int]] = deque(maxlen=_WINDOW)

    @property
    def num_requests(self) -> int:
        """Requests that wait."""
        return self._requests

    @property
    def num_tokens(self) -> int:
        """Prompt tokens that wait."""
        return self._tokens

    def reserve(self, num_requests: int, num_tokens: int) -> None:
        """Count requests in before they are tokenized; `num_tokens` may be an estimate.

        Raises `EngineOverloaded` when more would wait than max_queue_size or max_queued_tokens allow. A request
        that finds nobody waiting passes whatever its length, since for it no later time would be better.
        """
        max_requests, max_tokens = self._config.max_queue_size, self._config.max_queued_tokens
        with self._lock:
            excess = self._requests + num_requests - max_requests
            if excess > 0:
                raise self._full(f"{self._requests} of {max_requests} requests wait (max_queue_size)", excess, 1)
            excess = 0 if max_tokens is None else self._tokens + num_tokens - max_tokens
            if excess > 0 and self._requests:
                raise self._full(f"{self._tokens} of {max_tokens} tokens wait (max_queued_tokens)", excess, 2)
            self._requests += num_requests
            self._tokens += num_tokens

    def adjust(self, tokens_delta: int) -> None:
        """The exact prompt length became known: add the difference to the estimate. Never refuses."""
        with self._lock:
            self._tokens += tokens_delta

    def release(self, num_requests: int, num_tokens: int) -> None:
        """Count requests out: first planned, or dropped before that."""
        with self._lock:
            self._requests -= num_requests
            self._tokens -= num_tokens
            assert self._requests >= 0, "more requests were released than reserved"
            self._releases.append((self._clock(), num_requests, num_tokens))

    def _full(self, what: str, excess: int, column: int) -> EngineOverloaded:
        retry_after_s = self._wait_s(excess, column)
        message = f"Request queue is full: {what}. Retry in about {retry_after_s:.2g} s, or raise the limit."
        return EngineOverloaded(message, retry_after_s)

    def _wait_s(self, excess: int, column: int) -> float:
        """Time until `excess` have left at the rate of late, in which a stall counts; one second when unknown."""
        left = sum(release[column] for release in self._releases)
        if not left:
            return 1.0
        elapsed = self._clock() - self._releases[0][0]
        return min(max(excess * elapsed / left, _RETRY_S[0]), _RETRY_S[1])
