"""Stops an engine's threads when the interpreter exits while they work.

A thread that returns from an extension module during interpreter shutdown can crash the process, so every thread is
stopped first, for at most `EXIT_S` seconds. Requests are not failed: whatever still waits for one is a daemon thread
and ends with the process. Called by `atexit`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

EXIT_S = 1.0  # for all engines of a process together
_POLL_S = 0.02
# Loop threads that are to block, and whether they do: a blocked one runs no second callback that would say so.
_blocked: weakref.WeakKeyDictionary[threading.Thread, threading.Event] = weakref.WeakKeyDictionary()


class Haltable(Protocol):
    """An object that owns threads."""

    def halt(self, until: float) -> None:
        """Start nothing new; end the threads or block them forever. Return by `until` (monotonic seconds)."""
        ...


def halt_at_exit(*parts: Haltable) -> Callable[[], None]:
    """Halt these parts when the interpreter exits. Returns a function that cancels this."""
    pid = os.getpid()

    def halt() -> None:
        if os.getpid() == pid:  # a forked child has none of the threads
            for part in parts:
                _halt_despite_interruptions(part)

    # Exit handlers run in reverse order, and that of all finalizers, torch's among them, is registered with the first
    # one of a process. It must run after this one.
    weakref.finalize(halt, lambda: None).detach()
    atexit.register(halt)
    return functools.partial(atexit.unregister, halt)


def _halt_despite_interruptions(part: Haltable) -> None:
    """Halt a part although Ctrl-C is pressed meanwhile; the common time limit ends this."""
    while True:
        try:
            return part.halt(_until())
        except KeyboardInterrupt:
            continue


def block_loop_thread(loop: asyncio.AbstractEventLoop, thread: threading.Thread, until: float) -> None:
    """Make the thread of an event loop block forever instead of running its next callback.

    May be called again, where Ctrl-C interrupted it or what came after it.
    """
    blocked = _blocked.setdefault(thread, threading.Event())

    def wait_for_ever() -> None:
        blocked.set()
        threading.Event().wait()

    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(wait_for_ever)
        while _runs(thread) and not blocked.wait(_POLL_S) and time.monotonic() < until:
            pass


def interrupt(thread: threading.Thread, until: float) -> None:
    """End a thread's Python code by raising `SystemExit` in it; a call into an extension module runs to its end.

    Whatever the thread was doing stays unfinished, for instance an import: only for a process that exits.
    """
    from ctypes import c_ulong, py_object, pythonapi

    with _unreported_exits_of(thread):
        while _runs(thread) and time.monotonic() < until:
            pythonapi.PyThreadState_SetAsyncExc(c_ulong(thread.ident or 0), py_object(SystemExit))
            time.sleep(_POLL_S)
    if not _runs(thread):
        join_threads([thread], until)  # it still has to leave the interpreter


def _runs(thread: threading.Thread) -> bool:
    """Whether a thread runs Python code. `is_alive` says that it does not once Ctrl-C has interrupted a `join`."""
    return thread in threading.enumerate()


@contextlib.contextmanager
def _unreported_exits_of(thread: threading.Thread) -> Iterator[None]:
    """Print no `SystemExit` that hits this thread in a finalizer, from where it cannot propagate."""
    report = sys.unraisablehook

    def report_others(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is not SystemExit or threading.current_thread() is not thread:
            report(unraisable)

    sys.unraisablehook = report_others
    try:
        yield
    finally:
        sys.unraisablehook = report


def join_threads(threads: Sequence[threading.Thread], until: float) -> None:
    """Wait for threads that are about to end."""
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


@functools.cache
def _until() -> float:
    """The common time limit of all engines; cached, because a process exits once."""
    return time.monotonic() + EXIT_S
