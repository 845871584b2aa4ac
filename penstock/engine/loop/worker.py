"""`Worker`: the one thread on which a model is loaded and run.

A daemon thread, so that the interpreter's exit does not wait for it. Converts exceptions that would disturb an event
loop. Knows nothing about models. Created by `Host`, used by coroutines on its loop.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, NamedTuple, TypeVar, TypeVarTuple

from penstock.api.exiting import interrupt
from penstock.api.waiting import call_on_loop
from penstock.errors import ExecutionError, described

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Job(NamedTuple, Generic[T]):
    """Two futures of the calling loop: `begun` completes when the thread starts the job, `done` with its result."""

    begun: asyncio.Future[None]
    done: asyncio.Future[T]


class Worker:
    """Runs jobs one after another. The first job starts the thread."""

    def __init__(self, name: str) -> None:
        self._jobs = _Jobs()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        self._started = False
        self._ended = False

    @property
    def ident(self) -> int | None:
        """The thread's identifier; None before it has started."""
        return self._thread.ident

    def run(self, fn: Callable[[*Ts], T], *args: *Ts) -> Job[T]:
        """Run `fn` on the thread, unless `done` is cancelled before its turn. Call it from coroutines of one loop.

        Raises `RuntimeError` after `shutdown`. The job fails if something other than a job ends the thread.
        """
        if self._ended:
            raise RuntimeError("the worker was shut down")
        if not self._started:
            self._started = True
            self._thread.start()
        loop = asyncio.get_running_loop()
        job: Job[T] = Job(loop.create_future(), loop.create_future())
        call = functools.partial(_do, loop, job, functools.partial(fn, *args))
        self._jobs.open.append(call)
        self._jobs.queue.put(call)
        if self._jobs.fault is not None:
            self._jobs.fail(self._jobs.fault)
        return job

    def shutdown(self) -> None:
        """Finish the queued jobs, accept no more, and wait for the thread."""
        self._ended = True
        self._jobs.queue.put(None)
        if self._started:
            self._thread.join()

    def halt(self, until: float) -> None:
        """Interrupt the running job, start no other, and wait for the thread until then, because the process exits."""
        self._jobs.is_halting.set()
        self._jobs.queue.put(None)
        if self._started:
            interrupt(self._thread, until)


class _Jobs:
    """`open` are the jobs that have not ended, the first of which may run. `fault` is what ended the thread before."""

    def __init__(self) -> None:
        self.open: deque[functools.partial[None]] = deque()
        self.queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.is_halting = threading.Event()
        self.fault: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """Fail all jobs, because the thread ends: whoever waits for them would wait forever."""
        self.fault = error
        fault = ExecutionError(f"the thread of the model was ended by {described(error)}: create a new engine")
        while True:
            try:
                loop, job, _ = self.open.popleft().args
            except IndexError:  # the thread and whoever adds a job may do this at once
                return
            call_on_loop(loop, complete_future, job.begun, None, None)
            call_on_loop(loop, complete_future, job.done, None, fault)


def _work(jobs: _Jobs) -> None:
    try:
        while (job := jobs.queue.get()) is not None and not jobs.is_halting.is_set():
            job()
            jobs.open.popleft()
            del job  # so that an idle worker keeps nothing alive
    except BaseException as error:
        if not jobs.is_halting.is_set():
            jobs.fail(error)
        raise


def _do(loop: asyncio.AbstractEventLoop, job: Job[T], fn: Callable[[], T]) -> None:
    if job.done.cancelled():
        return
    call_on_loop(loop, complete_future, job.begun, None, None)
    try:
        result = fn()
    except BaseException as error:
        call_on_loop(loop, complete_future, job.done, None, _loop_safe(error))
        del job  # otherwise the error's traceback and the future keep each other alive
    else:
        call_on_loop(loop, complete_future, job.done, result, None)


def complete_future(future: asyncio.Future[T], result: T, error: BaseException | None) -> None:
    """Complete a future unless it is done; must be called on its own loop."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _loop_safe(error: BaseException) -> BaseException:
    """The error in a form that an event loop can deliver.

    A `StopIteration` would never reach the awaiting coroutine (Python 3.11); a `CancelledError` or `SystemExit` would
    end the loop's own task.
    """
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    loop_safe_error = ExecutionError(f"the model raised {described(error)}")
    loop_safe_error.__cause__ = error
    return loop_safe_error
