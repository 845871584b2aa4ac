"""`Readiness`: whether an engine makes progress, judged from its statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


class Readiness:
    """Notices work that waits without any step being made. Looks only when it is asked."""

    def __init__(self, stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_s = stall_s
        self._clock = clock
        self._progress: object = None
        self._since = clock()

    def reason(self, stats: Mapping[str, object]) -> str | None:
        """Why the engine is not ready, or None."""
        status = status_of(stats)
        if status != "running":
            return status
        queue, totals, now = stats.get("queue"), stats.get("totals"), self._clock()
        num_requests = queue.get("num_requests", 0) if isinstance(queue, Mapping) else 0
        progress = dict(totals) if isinstance(totals, Mapping) else None
        if not num_requests or progress != self._progress:
            self._progress, self._since = progress if num_requests else None, now
        return "stalled" if now - self._since > self._stall_s else None


def status_of(stats: Mapping[str, object]) -> str:
    """The engine's status; engines that do not say run."""
    return str(stats.get("engine_status", "running"))
