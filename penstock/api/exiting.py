"""How an engine's threads come to rest when the interpreter exits while they work, and when an engine is garbage.

At exit nothing is served, told or freed any more: whoever waits for a request is a daemon thread, and ends with the
process. But a thread that is inside an extension module while the interpreter is torn down can crash the process, so
each is stopped first, for `EXIT_S` seconds at most. Called by `atexit` and by the engine's finalizer.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

EXIT_S = 1.0  # for all engines of a process together
_POLL_S = 0.02


class Haltable(Protocol):
    """Has threads."""

    def halt(self, until: float) -> None:
        """Begin nothing new, and have the threads end or wait for ever; return at `until` (monotonic) at the latest."""
        ...


def halt_at_exit(*parts: Haltable) -> Callable[[], None]:
    """Have these rest when the interpreter exits; returns a function that takes that back."""
    pid = os.getpid()

    def halt() -> None:
        if os.getpid() == pid:  # a forked child has none of the threads
            for part in parts:
                part.halt(_until())

    atexit.register(halt)
    return functools.partial(atexit.unregister, halt)


def block_loop_thread(loop: asyncio.AbstractEventLoop, thread: threading.Thread, until: float) -> None:
    """Have a loop's thread wait for ever instead of taking its next turn."""
    blocked = threading.Event()

    def wait_for_ever() -> None:
        blocked.set()
        threading.Event().wait()

    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(wait_for_ever)
        while thread.is_alive() and not blocked.wait(_POLL_S) and time.monotonic() < until:
            pass


def interrupt(thread: threading.Thread, until: float) -> None:
    """End a thread's Python code wherever it is, by `SystemExit`; a call of an extension is not cut short.

    What was half done stays so, an import for instance: only for a process that ends.
    """
    from ctypes import c_ulong, py_object, pythonapi

    while thread.is_alive() and time.monotonic() < until:
        pythonapi.PyThreadState_SetAsyncExc(c_ulong(thread.ident or 0), py_object(SystemExit))
        thread.join(_POLL_S)


def join_threads(threads: Sequence[threading.Thread], until: float) -> None:
    """Wait for threads that are about to end."""
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


@functools.cache
def _until() -> float:
    """The process exits once."""
    return time.monotonic() + EXIT_S
