"""`Worker`: the one thread on which a model is loaded and run.

An executor without limits of its own: not joined when the interpreter exits, so that the engine can still end in order,
and nothing that a model raises can confuse an event loop. Knows nothing of models. Called by `Host`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any, TypeVar

from penstock.errors import ExecutionError

T = TypeVar("T")


class Worker(Executor):
    """Runs what is submitted, one after the other. The thread starts with the first submission."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        self._started = False
        self._ended = False

    @property
    def ident(self) -> int | None:
        """The thread's identifier; None before it started."""
        return self._thread.ident

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn` on the thread; from one thread at a time. Raises `RuntimeError` after `shutdown`."""
        if self._ended:
            raise RuntimeError("the worker was shut down")
        if not self._started:
            self._started = True
            self._thread.start()
        future: Future[T] = Future()
        self._jobs.put(lambda: _resolve(future, fn, args, kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more; what was submitted still runs."""
        self._ended = True
        self._jobs.put(None)
        if wait and self._started:
            self._thread.join()


def _work(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # an idle worker keeps nothing alive


def _resolve(future: Future[T], fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = fn(*args, **kwargs)
    except BaseException as error:
        future.set_exception(_portable(error))
        del future  # else its traceback and it keep each other alive
    else:
        future.set_result(result)


def _portable(error: BaseException) -> BaseException:
    """The error as an event loop can carry it: a `StopIteration` would never arrive at whoever awaits (Python 3.11),
    a `CancelledError` or `SystemExit` would end the loop's own task."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    found = ExecutionError(f"the model raised {type(error).__name__}: {error}")
    found.__cause__ = error
    return found
