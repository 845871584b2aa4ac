"""Stopping threads of a process that exits."""

import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable

import pytest

from penstock.api.event_loop import LoopThread
from penstock.api.exiting import interrupt

# A thread that is interrupted ends by `SystemExit`, which pytest reports.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Referent:
    """An object that can be weakly referenced."""


def in_a_finalizer(function: Callable[[], object]) -> None:
    referent = Referent()
    _reference = weakref.ref(referent, lambda _: function())
    del referent


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[type[BaseException]]:
    """The types of the exceptions that were reported because they could not propagate."""
    types: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: types.append(report.exc_type))
    return types


def test_a_thread_that_is_interrupted_in_a_finalizer_ends_and_prints_nothing(
    reports: list[type[BaseException]],
) -> None:
    """The import system has such finalizers, so Ctrl-C while a model loaded could print a second traceback."""
    hook, is_inside = sys.unraisablehook, threading.Event()

    def spin() -> None:
        is_inside.set()
        while True:
            pass

    def work() -> None:
        in_a_finalizer(spin)
        spin()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert is_inside.wait(60)
    interrupt(thread, time.monotonic() + 60)
    assert not thread.is_alive()
    assert reports == []
    assert sys.unraisablehook is hook


def test_the_thread_of_a_loop_that_is_blocked_already_is_not_waited_for() -> None:
    """Ctrl-C at the exit of a program had its handler start again, which then waited for as long as it may."""
    loop = LoopThread("loop")
    for _ in range(2):
        loop.halt(time.monotonic() + 600)
    assert loop.is_alive()


def test_a_thread_whose_join_was_interrupted_is_ended_all_the_same() -> None:
    """Python 3.11 takes it for ended then, so Ctrl-C at the exit of a program left the model's thread running."""
    is_inside = threading.Event()

    def work() -> None:
        is_inside.set()
        while True:
            pass

    def join() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        thread.join(60)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert is_inside.wait(60)
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            join()
    finally:
        signal.signal(signal.SIGALRM, previous)
    interrupt(thread, time.monotonic() + 60)
    assert thread not in threading.enumerate()


def test_what_a_finalizer_raises_in_another_thread_is_still_reported(
    reports: list[type[BaseException]], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end, sleep = threading.Event(), time.sleep

    def wait(seconds: float) -> None:
        """Run a finalizer on the thread that interrupts the other one."""
        if not may_end.is_set():
            in_a_finalizer(sys.exit)
            may_end.set()
        sleep(seconds)

    thread = threading.Thread(target=may_end.wait, daemon=True)
    thread.start()
    monkeypatch.setattr(time, "sleep", wait)
    interrupt(thread, time.monotonic() + 60)
    assert reports == [SystemExit]
