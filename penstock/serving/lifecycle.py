"""`Lifecycle`: which API calls are open, and whether new ones are accepted.

Draining makes the server not ready, refuses new calls, and lets the open ones finish; what is left after a while is
aborted, which its clients learn as an error. Runs on the server's loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from penstock.errors import RequestAborted
from penstock.serving.errors import HttpError

TOLD_S = 5.0  # time for clients to be told that their request was aborted


class Lifecycle:
    """Open calls by request id."""

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._num_open = 0
        self._cancels: dict[str, Callable[[], None]] = {}
        self._idle: asyncio.Event | None = None
        self.is_ready = True  # False before draining begins, so that load balancers turn away first
        self.is_draining = False
        self._is_aborting = False

    @property
    def num_open(self) -> int:
        """The number of open calls."""
        return self._num_open

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Count a call as open. Raises a 503 while draining, and a 429 beyond the limit."""
        if self.is_draining:
            raise _shutting_down()
        if self._num_open >= self._max_open:
            text = f"the server has {self._num_open} open requests, its limit"
            raise HttpError(429, text, code="engine_overloaded", retry_after_s=1)
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1
            if self._idle is not None and not self._num_open:
                self._idle.set()

    @contextlib.contextmanager
    def abortable(self, cancel: Callable[[], None], *request_ids: str) -> Iterator[None]:
        """Let `abort` end this request, by any of its ids, while the block runs. Raises a 503 if `abort_all` did."""
        for request_id in request_ids:
            self._cancels[request_id] = cancel
        try:
            yield
        except RequestAborted:
            if self._is_aborting:
                raise _shutting_down() from None
            raise
        finally:
            for request_id in request_ids:
                if self._cancels.get(request_id) is cancel:  # clients may use an id twice
                    del self._cancels[request_id]

    def abort(self, request_id: str) -> bool:
        """End an open request by its id; False for an unknown one."""
        cancel = self._cancels.get(request_id)
        if cancel is not None:
            cancel()
        return cancel is not None

    def abort_all(self) -> int:
        """End all open requests because the server shuts down; returns how many."""
        self._is_aborting = True
        cancels = set(self._cancels.values())
        for cancel in cancels:
            cancel()
        return len(cancels)

    async def drain(self, timeout_s: float) -> int:
        """Accept no new calls and wait for the open ones; returns the number of those aborted after `timeout_s`."""
        self.is_ready, self.is_draining = False, True
        if await self._wait_idle(timeout_s):
            return 0
        num_aborted = self.abort_all()
        await self._wait_idle(TOLD_S)
        return num_aborted

    def resume(self) -> None:
        """Accept calls again."""
        self.is_ready, self.is_draining, self._is_aborting = True, False, False

    async def _wait_idle(self, timeout_s: float) -> bool:
        self._idle = asyncio.Event()
        if not self._num_open:
            return True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return not self._num_open


def _shutting_down() -> HttpError:
    return HttpError(503, "the server is shutting down", code="draining", retry_after_s=5)
