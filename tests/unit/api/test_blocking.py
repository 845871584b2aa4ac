"""`run`: with and without a running loop in the calling thread."""

from __future__ import annotations

import asyncio
import contextvars
import signal
import threading

import pytest

from penstock.api.blocking import run

TENANT: contextvars.ContextVar[str] = contextvars.ContextVar("TENANT", default="nobody")


async def doubled(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


async def failing() -> None:
    await asyncio.sleep(0)
    raise LookupError("no such thing")


def test_a_coroutine_runs_without_a_loop() -> None:
    assert run(doubled(21)) == 42
    with pytest.raises(LookupError, match="no such thing"):
        run(failing())


def test_a_coroutine_runs_inside_a_running_loop() -> None:
    async def main() -> int:
        with pytest.raises(LookupError, match="no such thing"):
            run(failing())
        return run(doubled(21))

    assert asyncio.run(main()) == 42


def test_it_may_be_called_from_a_coroutine_that_it_runs() -> None:
    async def outer() -> int:
        return run(doubled(run(doubled(3))))

    assert run(outer()) == 12


@pytest.mark.parametrize("inside_loop", [False, True])
def test_the_context_variables_of_the_caller_hold(inside_loop: bool) -> None:
    async def tenant() -> str:
        return TENANT.get()

    async def main() -> str:
        return run(tenant())

    def call() -> str:
        TENANT.set("acme")
        return asyncio.run(main()) if inside_loop else run(tenant())

    assert contextvars.copy_context().run(call) == "acme"


def test_an_interruption_while_the_coroutine_is_being_started_cancels_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ran on, and nobody waited for it."""
    begun, ends, start = threading.Event(), list[str](), threading.Thread.start

    async def endless() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("cancelled")

    def start_and_interrupt(thread: threading.Thread) -> None:
        start(thread)
        assert begun.wait(60)
        raise KeyboardInterrupt

    async def main() -> None:
        monkeypatch.setattr(threading.Thread, "start", start_and_interrupt)
        run(endless())

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert ends == ["cancelled"]


@pytest.mark.parametrize("inside_loop", [False, True])
def test_an_interruption_cancels_the_coroutine(inside_loop: bool) -> None:
    ends: list[str] = []

    async def endless() -> None:
        try:
            threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, signal.SIGUSR1]).start()
            await asyncio.Event().wait()
        finally:
            ends.append("cancelled")

    async def main() -> None:
        run(endless())

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(main()) if inside_loop else run(endless())
        assert ends == ["cancelled"]
        assert not [thread for thread in threading.enumerate() if thread.name == "penstock-blocking"]
    finally:
        signal.signal(signal.SIGUSR1, previous)
