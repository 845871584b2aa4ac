"""Callbacks instead of iteration: one task per request passes its deltas, or its result, to a function.

The task runs on the event loop that submitted the request, or on a thread of its own for callers without a loop. It
never runs on the engine's thread and never holds a lock, so a callback may call the engine and even stop it. An
exception in a callback, `SystemExit` included, ends that request only.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from penstock.api.event_loop import LoopThread
from penstock.api.handle import RequestHandle
from penstock.errors import DeadlineExceeded, EngineClosed, RequestAborted, text_of
from penstock.outputs import CompletionOutput, Delta, RequestOutput

Fail = Callable[[str, BaseException], None]
T = TypeVar("T")


class Callbacks:
    """Starts the callback tasks and keeps them alive. `fail(request_id, error)` ends a request whose callback raised.

    An exception that a callback raises after its request has ended goes to the loop's exception handler, which logs it.
    On a caller's own loop, `SystemExit` and `KeyboardInterrupt` also propagate, as they do from any task.
    """

    def __init__(self, fail: Fail) -> None:
        self._fail = fail
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop_thread: LoopThread | None = None
        self._lock = threading.Lock()

    def stream(self, handle: RequestHandle, callback: Callable[[Delta], Awaitable[None] | None]) -> None:
        """Call `callback(delta)` for every delta; the last one has a finish reason."""
        self._start(self._stream(handle, callback))

    def finish(self, handle: RequestHandle, callback: Callable[[RequestOutput], Awaitable[None] | None]) -> None:
        """Call `callback(output)` once, when the request ends for any reason."""
        self._start(self._finish(handle, callback))

    def current_request(self) -> str | None:
        """The id of the request whose callback is calling, or None. The caller must not wait for that request."""
        context = _CURRENT.get()
        return (
            context.request_id if context is not None and context.is_running and context.callbacks() is self else None
        )

    def close(self) -> None:
        """End the fallback thread once its callbacks are done.

        Waits for that for a few seconds, except when called from a callback, which would wait for itself.
        """
        with self._lock:
            loop_thread, self._loop_thread = self._loop_thread, None
        if loop_thread is not None:
            loop_thread.close(wait=self.current_request() is None)

    def halt(self, until: float) -> None:
        """Start no further callbacks, because the process exits; a running callback may finish before `until`."""
        if self._loop_thread is not None:
            self._loop_thread.halt(until)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run_coroutine_threadsafe(coroutine, self._fallback_loop())
            return
        task = loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _fallback_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop_thread is None:
                self._loop_thread = LoopThread("penstock-callbacks")
            return self._loop_thread.loop

    async def _stream(self, handle: RequestHandle, callback: Callable[[Delta], Awaitable[None] | None]) -> None:
        context = self._enter(handle)
        while (delta := await _next(handle)) is not None:
            try:
                await context.call(callback, delta)
            except BaseException as error:
                self._handle_error(handle, context, error)
                return

    async def _finish(self, handle: RequestHandle, callback: Callable[[RequestOutput], Awaitable[None] | None]) -> None:
        context = self._enter(handle)
        output = await _outcome(handle)
        try:
            await context.call(callback, output)
        except BaseException as error:
            self._handle_error(handle, context, error)

    def _enter(self, handle: RequestHandle) -> _CallbackContext:
        context = _CallbackContext(weakref.ref(self), handle.request_id, asyncio.current_task())
        _CURRENT.set(context)
        return context

    def _handle_error(self, handle: RequestHandle, context: _CallbackContext, error: BaseException) -> None:
        """Fail the request. Re-raise an error that concerns the task itself or the caller's loop."""
        if context.ends_task(error):
            raise error
        loop, has_ended = asyncio.get_running_loop(), handle.done()
        if not has_ended:
            self._fail(handle.request_id, error)
        if isinstance(error, SystemExit | KeyboardInterrupt) and not isinstance(threading.current_thread(), LoopThread):
            raise error  # ends the caller's loop, as it would from any other task
        if has_ended or not isinstance(error, Exception):
            event = "raised an exception after the request had ended" if has_ended else "raised an exit exception"
            message = f"the callback of request {handle.request_id} {event}"
            loop.call_exception_handler({"message": message, "exception": error})


@dataclass(slots=True)
class _CallbackContext:
    """Marks code that runs inside a callback, also on other threads and tasks that the callback waits for."""

    callbacks: weakref.ref[Callbacks]
    request_id: str
    task: asyncio.Task[Any] | None
    is_running: bool = False

    async def call(self, callback: Callable[[T], Awaitable[None] | None], item: T) -> None:
        """Call the callback, and await the result if it is awaitable."""
        self.is_running = True
        try:
            returned = callback(item)
            if inspect.isawaitable(returned):
                await returned
        finally:
            self.is_running = False

    def ends_task(self, error: BaseException) -> bool:
        """Whether the task itself was cancelled or closed. A callback may raise the same exception types."""
        if isinstance(error, asyncio.CancelledError):
            return self.task is not None and self.task.cancelling() > 0
        with contextlib.suppress(RuntimeError):  # no running loop
            return isinstance(error, GeneratorExit) and asyncio.current_task() is not self.task
        return True


# The callback that the current code runs in, if any.
_CURRENT: ContextVar[_CallbackContext | None] = ContextVar("penstock_callback", default=None)


async def _next(handle: RequestHandle) -> Delta | None:
    """The next delta, or None after the last one, which already carries the reason of the end."""
    try:
        return await anext(handle)
    except Exception:
        return None


async def _outcome(handle: RequestHandle) -> RequestOutput:
    try:
        return await handle
    except Exception as error:
        return getattr(error, "output", None) or _empty(handle, error)


def _empty(handle: RequestHandle, error: Exception) -> RequestOutput:
    """The output passed to the callback of a request that failed before it produced any."""
    reasons = ((RequestAborted | EngineClosed, "abort"), (DeadlineExceeded, "deadline"), (Exception, "error"))
    empty = CompletionOutput(finish_reason=next(name for kind, name in reasons if isinstance(error, kind)))
    return RequestOutput(handle.request_id, handle.prompt, handle.prompt_token_ids, [empty], True, error=text_of(error))
