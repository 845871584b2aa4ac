"""`Channel`: what lies between the engine's thread and whoever waits for one request.

A one-slot mailbox per completion: deltas that nobody took yet merge, so a slow reader costs its own memory once and
nobody else anything. Written by the engine's thread, read from any thread or loop; holds no reference to the engine.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from enum import Enum

from penstock.outputs import Delta, RequestOutput


class RequestStatus(Enum):
    """How far a request has come."""

    QUEUED = "queued"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self not in (RequestStatus.QUEUED, RequestStatus.PROCESSING)


def merge(first: Delta, second: Delta) -> Delta:
    """Two deltas of one completion as one."""
    return Delta(
        request_id=first.request_id,
        index=first.index,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        finish_reason=second.finish_reason,
        stop_reason=second.stop_reason,
    )


class Wakeups:
    """Futures to complete, grouped so that each consumer loop is entered once per step."""

    def __init__(self) -> None:
        self._by_loop: defaultdict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = defaultdict(list)

    def add(self, waiters: list[asyncio.Future[None]]) -> None:
        """Remember waiters to wake."""
        for waiter in waiters:
            self._by_loop[waiter.get_loop()].append(waiter)

    def send(self) -> None:
        """Wake everybody: one `call_soon_threadsafe` per loop. A closed loop has nobody left to wake."""
        for loop, waiters in self._by_loop.items():
            try:
                loop.call_soon_threadsafe(_complete, waiters)
            except RuntimeError:
                continue
        self._by_loop.clear()


def _complete(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)


class Channel:
    """One request's news. The lock is held for a few assignments and never while anything else runs."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.status = RequestStatus.QUEUED
        self.prompt: str | None = None
        self.prompt_token_ids: list[int] = []
        self._lock = threading.Lock()
        self._pending: dict[int, Delta] = {}
        self._output: RequestOutput | None = None
        self._error: BaseException | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._ended = threading.Event()

    # Engine's side.

    def put(self, delta: Delta, wakeups: Wakeups) -> None:
        """Offer a delta; it merges with one that was not taken yet."""
        with self._lock:
            waiting = self._pending.get(delta.index)
            self._pending[delta.index] = merge(waiting, delta) if waiting else delta
            waiters, self._waiters = self._waiters, []
        wakeups.add(waiters)

    def end(self, status: RequestStatus, output: RequestOutput | None, error: BaseException | None, wakeups: Wakeups) -> None:
        """The one terminal event: a result, or the error that awaiting raises."""
        with self._lock:
            assert not self.status.ended, f"request {self.request_id} ended twice"
            self.status, self._output, self._error = status, output, error
            waiters, self._waiters = self._waiters, []
        self._ended.set()
        wakeups.add(waiters)

    # Reader's side.

    @property
    def ended(self) -> bool:
        """Whether the terminal event has happened."""
        return self._ended.is_set()

    async def take(self) -> Delta | None:
        """The next delta, or None at the regular end; raises the request's error after its last delta."""
        while True:
            with self._lock:
                if self._pending:
                    return self._pending.pop(next(iter(self._pending)))
                if self.ended:
                    break
                waiter = self._new_waiter()
            await waiter
        if self._error is not None:
            raise self._error
        return None

    async def wait(self) -> RequestOutput:
        """The final result; raises the request's error."""
        while True:
            with self._lock:
                if self.ended:
                    break
                waiter = self._new_waiter()
            await waiter
        return self.outcome()

    def wait_blocking(self, timeout_s: float | None) -> RequestOutput:
        """`wait` for threads without a loop. Raises `TimeoutError`."""
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"request {self.request_id} did not end within {timeout_s} s")
        return self.outcome()

    def outcome(self) -> RequestOutput:
        """The result of an ended request, or its error raised."""
        if self._error is not None:
            raise self._error
        assert self._output is not None
        return self._output

    def _new_waiter(self) -> asyncio.Future[None]:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters = [w for w in self._waiters if not w.done()]
        self._waiters.append(waiter)
        return waiter
