"""`WeightGate`: requests run together, an update of the weights runs alone, and both wait in a queue that is served.

A reader/writer lock that knows versions. A request counts as running from the moment it is let in until it leaves, and
an update is let in when none runs; from its arrival on, new requests wait. Waiting is a future, so threads and event
loops wait alike, without polling and without a time limit. Knows no model and no server; owned by
`WeightSyncController`.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass

from penstock.api.waiting import result_of
from penstock.errors import EngineStateError, WeightsError, described

Waiting = deque[Future[int]]


@dataclass(slots=True)
class _Lease:
    """A request that was let in. It has ended when nobody holds it."""

    version: int
    owner: int  # the task or thread that waited for it
    num_holders: int = 1


# Of the running task or thread; tasks that it starts are part of the request while that goes on.
_leases: ContextVar[Mapping[object, _Lease]] = ContextVar("_leases", default={})  # noqa: B039 (it is never changed)


class WeightGate:
    """The gate of one service.

    `staleness` bounds how many batches may be complete that the served weights were not trained on yet; beyond it, new
    requests wait for the next update. Versions count updates, from 0. After an update that failed, requests get a
    `WeightsError` until another one succeeds, or `resume`.
    """

    def __init__(self, staleness: float = math.inf) -> None:
        self._staleness = staleness
        self._lock = threading.Lock()
        self._requests: Waiting = deque()
        self._updates: Waiting = deque()
        self._num_running = 0
        self._version = 0
        self._num_trained = 0
        self._num_batches = 0
        self._target: int | None = None  # the version that the running update makes
        self._failure: BaseException | None = None

    @property
    def version(self) -> int:
        """The version of the weights in service."""
        return self._version

    @property
    def num_trained(self) -> int:
        """The newest version that the trainer has announced."""
        return self._num_trained

    @property
    def num_running(self) -> int:
        """The number of requests inside."""
        return self._num_running

    @property
    def is_open(self) -> bool:
        """Whether a request that arrives now is let in at once."""
        with self._lock:
            return self._failure is None and self._lets_in

    def add_batch(self) -> None:
        """Another batch of trajectories is complete."""
        with self._lock:
            self._num_batches += 1

    def add_trained(self) -> None:
        """The trainer has made another version."""
        with self._lock:
            self._num_trained += 1

    def check(self) -> None:
        """Raise `WeightsError` if the last update failed."""
        with self._lock:
            if self._failure is not None and not self._is_updating:
                raise _refusal(self._failure)

    def resume(self) -> None:
        """Serve the weights as they are, although the last update failed."""
        with self._lock:
            self._failure = None
        self._advance()

    @contextmanager
    def request(self) -> Iterator[int]:
        """Run a request: waits, and gives the version that it will run with to its end. Raises `WeightsError`.

        A request inside another one of the same task or thread belongs to it, and does not wait.
        """
        lease = self._joined()
        if lease is None:
            place = self._enter(self._requests)
            try:
                lease = _Lease(place.result(), _running())
            except BaseException:
                self._abandon(place, self._requests, self._leave)
                raise
        with self._holding(lease):
            yield lease.version

    @asynccontextmanager
    async def arequest(self) -> AsyncIterator[int]:
        """`request` for event loops."""
        lease = self._joined()
        if lease is None:
            place = self._enter(self._requests)
            try:
                lease = _Lease(await result_of(place), _running())
            except BaseException:
                self._abandon(place, self._requests, self._leave)
                raise
        with self._holding(lease):
            yield lease.version

    @contextmanager
    def update(self) -> Iterator[int]:
        """Run an update: waits until no request runs, and gives the version that it makes. An exception fails it.

        Raises `EngineStateError` inside a request.
        """
        self._check_update()
        place = self._enter(self._updates)
        try:
            target = place.result()
        except BaseException:
            self._abandon(place, self._updates, self._withdraw)
            raise
        with self._ending():
            yield target

    @asynccontextmanager
    async def aupdate(self) -> AsyncIterator[int]:
        """`update` for event loops."""
        self._check_update()
        place = self._enter(self._updates)
        try:
            target = await result_of(place)
        except BaseException:
            self._abandon(place, self._updates, self._withdraw)
            raise
        with self._ending():
            yield target

    @contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._end_update(error)
            raise
        self._end_update(None)

    def _joined(self) -> _Lease | None:
        """The request that this code runs in already, with one holder more."""
        with self._lock:
            lease = _leases.get().get(self)
            if lease is None or lease.num_holders == 0:
                return None
            lease.num_holders += 1
            return lease

    @contextmanager
    def _holding(self, lease: _Lease) -> Iterator[None]:
        outer = _leases.get()
        _leases.set({**outer, self: lease})
        try:
            yield
        finally:
            _leases.set(outer)
            with self._lock:
                lease.num_holders -= 1
                has_ended = lease.num_holders == 0
            if has_ended:
                self._leave()

    def _check_update(self) -> None:
        """Raise `EngineStateError` for an update that would wait for itself."""
        lease = _leases.get().get(self)
        if lease is not None and lease.num_holders > 0 and lease.owner == _running():
            raise EngineStateError("an update inside a request of the same service would never begin: move it out")

    @property
    def _is_updating(self) -> bool:
        return self._target is not None or bool(self._updates)

    @property
    def _lets_in(self) -> bool:
        return not self._is_updating and self._num_batches - self._version <= self._staleness

    def _enter(self, queue: Waiting) -> Future[int]:
        place = Future[int]()
        with self._lock:
            queue.append(place)
        self._advance()
        return place

    def _leave(self) -> None:
        with self._lock:
            self._num_running -= 1
        self._advance()

    def _withdraw(self) -> None:
        """An update was let in and never began."""
        with self._lock:
            self._target = None
        self._advance()

    def _end_update(self, error: BaseException | None) -> None:
        with self._lock:
            assert self._target is not None
            if error is None:
                self._version = self._target
                self._num_trained = max(self._num_trained, self._version)
                self._num_batches = max(self._num_batches, self._version)  # the bound counts from these weights on
            self._target, self._failure = None, error
            failed = self._granted(self._requests) if error is not None else []
        for place in failed:
            place.set_exception(_refusal(error))
        self._advance()

    def _abandon(self, place: Future[int], queue: Waiting, undo: Callable[[], None]) -> None:
        """Whoever waited here does not any more. `undo` gives back what was granted meanwhile."""
        if place.cancel():
            with self._lock, suppress(ValueError):  # it may have left the queue meanwhile
                queue.remove(place)
            self._advance()
        elif place.exception() is None:  # granted: the result is set, or is about to be
            undo()

    def _advance(self) -> None:
        """Let in whom the state admits. Every change of the state ends here, so no wake-up is lost."""
        with self._lock:
            failure = None if self._is_updating else self._failure
            places = self._granted(self._requests) if failure is not None or self._lets_in else []
            self._num_running += len(places) if failure is None else 0
            version, update = self._version, self._next_update()
            target = self._target
        for place in places:
            if failure is None:
                place.set_result(version)
            else:
                place.set_exception(_refusal(failure))
        if update is not None and target is not None:
            update.set_result(target)

    def _granted(self, queue: Waiting) -> list[Future[int]]:
        """All who wait here, but for those that were cancelled; from now on they cannot be."""
        places = [place for place in queue if place.set_running_or_notify_cancel()]
        queue.clear()
        return places

    def _next_update(self) -> Future[int] | None:
        """The update that may begin now, whose version is settled here."""
        if self._target is not None or self._num_running:
            return None
        while self._updates:
            update = self._updates.popleft()
            if update.set_running_or_notify_cancel():
                self._target = max(self._version + 1, self._num_trained)
                return update
        return None


def _running() -> int:
    """What runs this code: an asyncio task, or else a thread."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident() if task is None else id(task)


def _refusal(cause: BaseException | None) -> WeightsError:
    """A new error for each request: they raise it on threads of their own."""
    reason = described(cause) if cause is not None else "unknown"
    is_mixed = isinstance(cause, WeightsError) and cause.is_mixed
    text = f"the weights could not be updated ({reason}): update them again, or call resume"
    error = WeightsError(text, is_mixed=is_mixed)
    error.__cause__ = cause
    return error
