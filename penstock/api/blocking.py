"""`run`: the result of a coroutine, for a caller that blocks; `entered` and `blocking`: blocks and functions, likewise.

Called by the synchronous faces of asynchronous methods. Where the calling thread already runs an event loop, as in a
notebook, the coroutine runs on a loop of another thread, and the calling loop is blocked until it has ended.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from penstock.api.waiting import call_on_loop
from penstock.errors import EngineStateError

T = TypeVar("T")
P = ParamSpec("P")

# Modes of a library that hold for one thread, as those of torch do: each function captures the calling thread's, and
# returns a block in which they hold on another thread.
thread_modes: list[Callable[[], AbstractContextManager[None]]] = []


@dataclass(slots=True, eq=False)
class _Update:
    """A block of `entered`; its engine is None once it has ended."""

    engine: object


_updates: ContextVar[tuple[_Update, ...]] = ContextVar("updates", default=())


def run(coroutine: Coroutine[object, object, T]) -> T:
    """Run a coroutine to its end and return its result. Raises what it raises.

    An interruption of the calling thread (Ctrl-C) cancels the coroutine and waits until it has ended.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_awaited(coroutine))
    return _run_on_thread(coroutine)


def blocking(function: Callable[P, Coroutine[object, object, T]]) -> Callable[P, T]:
    """The function of the same signature that blocks until the coroutine has ended."""

    @functools.wraps(function)
    def blocks(*args: P.args, **options: P.kwargs) -> T:
        return run(function(*args, **options))

    return blocks


@contextmanager
def entered(block: AbstractAsyncContextManager[T], engine: object) -> Iterator[T]:
    """An update of an engine, an asynchronous block, as a `with` block. Its exit suppresses no exception.

    Raises what the block raises.
    """
    value = run(block.__aenter__())
    update = _Update(engine)
    _updates.set((*(other for other in _updates.get() if other.engine is not None), update))
    try:
        yield value
    except BaseException as error:
        run(block.__aexit__(type(error), error, error.__traceback__))
        raise
    else:
        run(block.__aexit__(None, None, None))
    finally:
        update.engine = None


def refuse_inside_update(engine: object) -> None:
    """Raise `EngineStateError` for a blocking call that waits for requests inside of its own caller's `entered`."""
    if any(update.engine is engine for update in _updates.get()):
        raise EngineStateError(
            "this call would wait forever: no request runs inside of the with block that updates the weights; make it "
            "after the block"
        )


def _run_on_thread(coroutine: Coroutine[object, object, T]) -> T:
    outcome, tasks = Future[T](), Future[asyncio.Task[T]]()
    context = contextvars.copy_context()  # the caller's context variables hold there too
    modes = [capture() for capture in thread_modes]

    def work() -> None:
        try:
            with ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode)
                result = context.run(asyncio.run, _noted(coroutine, tasks))
            outcome.set_result(result)
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="penstock-blocking", daemon=True)
    try:
        thread.start()
        return outcome.result()
    except BaseException:
        if thread.ident is not None and not outcome.done():  # the caller was interrupted, perhaps at the start
            task = tasks.result()
            call_on_loop(task.get_loop(), task.cancel)
        raise
    finally:
        if thread.ident is not None:
            thread.join()


async def _noted(coroutine: Coroutine[object, object, T], tasks: Future[asyncio.Task[T]]) -> T:
    """Await a coroutine as a task that is also the result of `tasks`."""
    task = asyncio.ensure_future(_awaited(coroutine))
    tasks.set_result(task)
    return await task


async def _awaited(coroutine: Coroutine[object, object, T]) -> T:
    return await coroutine
