"""Lets a coroutine of asyncio or trio wait for another thread.

A `Waiter` belongs to the loop on which it was created; another thread completes it through one `call_on_loop`. Called
by channels, the engine's host and its output processor.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Generator, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")
# How many waiters complete before other callbacks of their loop get a turn: a step may wake hundreds of streams, each
# of which then runs for 0.1 ms.
_BURST = 16


class Loop(Hashable, Protocol):
    """An event loop as seen from other threads."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: object) -> object:
        """Call a function on the loop's thread. Raises `RuntimeError` once the loop is closed."""
        ...


class Waiter(Protocol):
    """An awaitable that completes when `set_result` is called on its loop; an `asyncio.Future` is one."""

    def __await__(self) -> Generator[object, None, None]: ...

    def done(self) -> bool:
        """Whether it was completed, or its coroutine was cancelled."""
        ...

    def set_result(self, result: None, /) -> None:
        """Complete it."""
        ...

    def get_loop(self) -> Loop:
        """The loop that it belongs to."""
        ...


def new_waiter() -> Waiter:
    """A waiter of the running event loop, asyncio's or trio's."""
    try:
        return asyncio.get_running_loop().create_future()
    except RuntimeError:
        return _TrioWaiter()


async def result_of(future: Future[T]) -> T:
    """Wait for a future of another thread, on asyncio or trio, without blocking the loop. Raises its exception."""
    waiter = new_waiter()
    future.add_done_callback(lambda _: call_on_loop(waiter.get_loop(), complete, [waiter]))
    await waiter
    return future.result()


def call_on_loop(loop: Loop, function: Callable[..., object], *args: object) -> bool:
    """Call a function on another thread's event loop. Returns False if the loop is closed: nothing waits on it."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)
        return True
    return False


class Wakeups:
    """Waiters to complete, grouped so that each loop is called once per step."""

    def __init__(self) -> None:
        self._by_loop: defaultdict[Loop, list[Waiter]] = defaultdict(list)

    def add(self, waiters: list[Waiter]) -> None:
        """Add waiters to wake."""
        for waiter in waiters:
            self._by_loop[waiter.get_loop()].append(waiter)

    def send(self) -> None:
        """Wake all of them, with one call per loop."""
        for loop, waiters in self._by_loop.items():
            call_on_loop(loop, complete, waiters)
        self._by_loop.clear()


def complete(waiters: list[Waiter]) -> None:
    """Complete waiters of one loop, on that loop, `_BURST` of them in each of its iterations; ignore those done."""
    for waiter in waiters[:_BURST]:
        if not waiter.done():
            waiter.set_result(None)
    if len(waiters) > _BURST:
        call_on_loop(waiters[_BURST].get_loop(), complete, waiters[_BURST:])


@dataclass(frozen=True, slots=True)
class _TrioLoop:
    run_sync_soon: Callable[..., None]

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: object) -> None:
        self.run_sync_soon(callback, *args)  # raises trio's `RunFinishedError`, a `RuntimeError`


class _TrioWaiter:
    """A waiter on trio. Raises `RuntimeError` where no event loop runs."""

    def __init__(self) -> None:
        try:
            import trio
        except ImportError:
            raise RuntimeError("no running event loop") from None
        self._loop = _TrioLoop(trio.lowlevel.current_trio_token().run_sync_soon)
        self._event = trio.Event()

    def __await__(self) -> Generator[object, None, None]:
        return self._event.wait().__await__()

    def done(self) -> bool:
        """Whether it was completed."""
        return self._event.is_set()

    def set_result(self, result: None, /) -> None:
        """Complete it."""
        self._event.set()

    def get_loop(self) -> Loop:
        """The trio run that it belongs to."""
        return self._loop
