"""`RoomQueue`: coroutines that wait until admission has room for a request.

Owns their order: higher classes first, then the longest waiting. Never reserves a place and never holds a request.
Called by `wait_for_room` on any event loop, and by `Admission` and `Host` on any thread.
"""

from __future__ import annotations

import threading
import weakref
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from penstock.api.waiting import Waiter, Wakeups, call_on_loop, complete, new_waiter
from penstock.scheduling.admission import Admission


class Closing(Protocol):
    """What refuses requests at some time, and then calls `on_close`."""

    on_close: Callable[[], None]

    def check_open(self) -> None:
        """Raise `EngineClosed` once requests are refused."""
        ...


@dataclass(slots=True, eq=False)
class _Entry:
    """One waiting coroutine. `is_woken` is true between completing its waiter and the coroutine's next run."""

    num_tokens: int
    priority: int
    waiter: Waiter
    is_queued: bool = False
    is_woken: bool = False


class RoomQueue:
    """Every freed place wakes the next entry; so does every entry that leaves the queue, in case there is more room.

    A wakeup is a hint: a woken entry checks again, and keeps its position if another request took the place. Entries
    are woken in order, so short prompts do not overtake a long one. A woken entry does not block those after it,
    because its loop may be blocked. `admission` and `host` hold weak references to this object: its waiters refer to
    suspended frames, which refer to the engine.
    """

    def __init__(self, admission: Admission, host: Closing) -> None:
        self._admission = admission
        self._host = host
        # Reentrant: an allocation under the lock may trigger the garbage collector, which may finalize the engine.
        self._lock = threading.RLock()
        self._entries: list[_Entry] = []
        self._on_release = _weak(self.wake_next)
        host.on_close = _weak(self.wake_all)

    async def wait(self, num_tokens: int, priority: int) -> None:
        """Wait until a request with this many prompt tokens would be admitted. Raises `EngineClosed`."""
        entry = _Entry(num_tokens, priority, new_waiter())
        try:
            while not self._leave(entry):
                await entry.waiter
        except BaseException:  # closed, or cancelled by any kind of event loop
            self._remove(entry)
            self.wake_next()
            raise

    def wake_next(self) -> None:
        """Wake the first entry that is not woken yet, if there is room for it."""
        with self._lock:
            while (entry := next((entry for entry in self._entries if not entry.is_woken), None)) is not None:
                if not self._admission.has_room(entry.num_tokens, entry.priority):
                    return
                entry.is_woken = True
                if call_on_loop(entry.waiter.get_loop(), complete, [entry.waiter]):
                    return
                self._remove(entry)  # its loop is closed

    def wake_all(self) -> None:
        """Wake every entry, because the engine stops."""
        wakeups = Wakeups()
        with self._lock:
            for entry in self._entries:
                entry.is_woken = True
            wakeups.add([entry.waiter for entry in self._entries])
        wakeups.send()

    def _leave(self, entry: _Entry) -> bool:
        """Remove an entry if it is next and has room; otherwise keep it queued. Raises `EngineClosed`."""
        with self._lock:
            if not entry.is_queued:  # before the check: a place freed after the check then wakes the entry
                insort(self._entries, entry, key=lambda entry: -entry.priority)
                entry.is_queued = True
                self._admission.on_release = self._on_release
            self._host.check_open()
            is_next = entry.is_woken or entry is self._entries[0]
            if is_next and self._admission.has_room(entry.num_tokens, entry.priority):
                self._remove(entry)
                if self._entries:  # in the loop's next iteration, after the caller has submitted its request
                    call_on_loop(entry.waiter.get_loop(), self.wake_next)
                return True
            if entry.is_woken:
                entry.is_woken, entry.waiter = False, new_waiter()
            elif not is_next:
                self.wake_next()  # the entries before it may be woken already, or a limit was raised
            return False

    def _remove(self, entry: _Entry) -> None:
        with self._lock:
            if entry.is_queued:
                self._entries.remove(entry)
                entry.is_queued = False
                if not self._entries:
                    self._admission.on_release = None


def _weak(method: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls the method while its object is alive, and does not keep it alive."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        if (referent := reference()) is not None:
            referent()

    return call
