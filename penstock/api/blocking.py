"""`run`: the result of a coroutine, for a caller that blocks.

Called by the synchronous faces of asynchronous methods. Where the calling thread already runs an event loop, as in a
notebook, the coroutine runs on a loop of another thread, and the calling loop is blocked until it has ended.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import TypeVar

from penstock.api.waiting import call_on_loop

T = TypeVar("T")


def run(coroutine: Coroutine[object, object, T]) -> T:
    """Run a coroutine to its end and return its result. Raises what it raises.

    An interruption of the calling thread (Ctrl-C) cancels the coroutine and waits until it has ended.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_awaited(coroutine))
    return _run_on_thread(coroutine)


def _run_on_thread(coroutine: Coroutine[object, object, T]) -> T:
    outcome, tasks = Future[T](), Future[asyncio.Task[T]]()
    context = contextvars.copy_context()  # the caller's context variables hold there too

    def work() -> None:
        try:
            outcome.set_result(context.run(asyncio.run, _noted(coroutine, tasks)))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="penstock-blocking", daemon=True)
    thread.start()
    try:
        return outcome.result()
    except BaseException:
        if not outcome.done():  # the caller was interrupted
            task = tasks.result()
            call_on_loop(task.get_loop(), task.cancel)
        raise
    finally:
        thread.join()


async def _noted(coroutine: Coroutine[object, object, T], tasks: Future[asyncio.Task[T]]) -> T:
    """Await a coroutine as a task that is also the result of `tasks`."""
    task = asyncio.ensure_future(_awaited(coroutine))
    tasks.set_result(task)
    return await task


async def _awaited(coroutine: Coroutine[object, object, T]) -> T:
    return await coroutine
