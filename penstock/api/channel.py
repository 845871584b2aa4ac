"""`Channel`: passes one request's deltas and its result from the engine's thread to its readers.

Holds the transcripts with unread text. A delta is built when a reader takes it and covers everything new, so a slow
reader costs nothing. Written by the engine's thread, read from any thread or event loop; never refers to an engine.
"""

from __future__ import annotations

import math
import threading
from enum import Enum

from penstock.api.transcript import Transcript
from penstock.api.waiting import Waiter, Wakeups, new_waiter
from penstock.outputs import Delta, RequestOutput
from penstock.sampling import RequestPriority


class RequestStatus(Enum):
    """The state of a request."""

    QUEUED = "queued"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether the request has ended, for any reason."""
        return self not in (RequestStatus.QUEUED, RequestStatus.PROCESSING)


class Channel:
    """One request's channel. Its lock is held for a few assignments only."""

    def __init__(
        self, request_id: str, priority: RequestPriority = RequestPriority.NORMAL, deadline: float = math.inf
    ) -> None:
        self.request_id = request_id
        self.priority = priority
        self.deadline = deadline
        self.status = RequestStatus.QUEUED
        self.prompt: str | None = None
        self.prompt_token_ids: list[int] = []
        self._lock = threading.Lock()
        self._unread: dict[Transcript, None] = {}  # an ordered set
        self._output: RequestOutput | None = None
        self._error: BaseException | None = None
        self._readers: list[Waiter] = []  # waiting for the next delta
        self._waiters: list[Waiter] = []  # waiting for the end; deltas do not wake them
        self._admissions: list[Waiter] = []  # waiting until the prompt has been checked
        self._admitted = False
        self._ended = threading.Event()

    # Called by the engine.

    def admit(self) -> list[Waiter]:
        """Record that the request passed every check; returns the waiters to wake. The first token implies it."""
        with self._lock:
            self._admitted = True
            waiting, self._admissions = self._admissions, []
        return waiting

    def put(self, transcript: Transcript, wakeups: Wakeups) -> None:
        """Publish what was added to a transcript since the last `put`, and wake readers."""
        with self._lock:
            transcript.show()
            self._unread[transcript] = None
            readers, self._readers = self._readers, []
            if not self._admitted and transcript.token_ids:
                self._admitted = True
                readers, self._admissions = readers + self._admissions, []
        if readers:
            wakeups.add(readers)

    def end(
        self, status: RequestStatus, output: RequestOutput | None, error: BaseException | None, wakeups: Wakeups
    ) -> None:
        """Record the one terminal event: a result, or the error that awaiting raises."""
        with self._lock:
            assert not self.status.ended, f"request {self.request_id} ended twice"
            self.status, self._output, self._error = status, output, error
            waiting = self._readers + self._waiters + self._admissions
            self._readers, self._waiters, self._admissions = [], [], []
            self._ended.set()  # under the lock: a waiter registered after this would never wake
        wakeups.add(waiting)

    # Called by readers.

    @property
    def ended(self) -> bool:
        """Whether the terminal event has happened."""
        return self._ended.is_set()

    async def take(self) -> Delta | None:
        """The next delta, or None at the regular end. Raises the request's error after its last delta."""
        while True:
            with self._lock:
                if self._unread:
                    self._unread.pop(transcript := next(iter(self._unread)))
                    return transcript.take()
                if self.ended:
                    break
                reader = _join(self._readers)
            await reader
        self._raise()
        return None

    async def wait_admitted(self) -> None:
        """Wait until the request was admitted. Raises the error of one that was refused."""
        while True:
            with self._lock:
                if self._admitted:
                    return
                if self.ended:
                    break
                waiter = _join(self._admissions)
            await waiter
        self._raise()

    async def wait(self) -> RequestOutput:
        """Wait for the final result. Raises the request's error."""
        while True:
            with self._lock:
                if self.ended:
                    break
                waiter = _join(self._waiters)
            await waiter
        return self.outcome()

    def wait_blocking(self, timeout_s: float | None) -> RequestOutput:
        """`wait` for threads without an event loop. Raises `TimeoutError` after `timeout_s` seconds."""
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"request {self.request_id} did not end within {timeout_s} s")
        return self.outcome()

    def outcome(self) -> RequestOutput:
        """Return the result of an ended request, or raise its error."""
        self._raise()
        assert self._output is not None
        return self._output

    def _raise(self) -> None:
        """Raise the error, if any, without the traceback of earlier raises."""
        if self._error is not None:
            raise self._error.with_traceback(None)


def _join(waiters: list[Waiter]) -> Waiter:
    """Add a waiter of the running loop to the list, and drop completed ones."""
    if waiters:
        waiters[:] = [waiter for waiter in waiters if not waiter.done()]
    waiters.append(waiter := new_waiter())
    return waiter
