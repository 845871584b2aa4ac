"""Callbacks instead of iteration: a pump per request that feeds its deltas, or its result, to a function.

Runs on the loop that submitted the request, or, for callers without a loop, on a thread of its own; never on the
engine's thread and never under a lock, so a callback may call back into the engine, and stop it. A raising callback,
be it by `sys.exit()`, ends its request alone.
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
from penstock.errors import DeadlineExceeded, RequestAborted, text_of
from penstock.outputs import CompletionOutput, Delta, RequestOutput

Fail = Callable[[str, BaseException], None]
T = TypeVar("T")


class Callbacks:
    """Starts pumps and keeps them alive. `fail(request_id, error)` ends a request whose callback raised.

    What a callback raises after its request has ended goes to the loop's exception handler, which logs it. On a loop
    of the caller's, a `SystemExit` or `KeyboardInterrupt` also does what it does in any task there.
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
        """Call `callback(output)` once, at the end, however the request ends."""
        self._start(self._finish(handle, callback))

    def current_request(self) -> str | None:
        """The request in whose callback the caller runs, if it does: it must not wait for that one."""
        context = _CURRENT.get()
        return (
            context.request_id if context is not None and context.is_running and context.callbacks() is self else None
        )

    def close(self) -> None:
        """End the thread for callers without a loop once its callbacks are done.

        Waits a few seconds for that, but not in a callback, which would be among those that it waits for.
        """
        with self._lock:
            loop_thread, self._loop_thread = self._loop_thread, None
        if loop_thread is not None:
            loop_thread.close(wait=self.current_request() is None)

    def halt(self, until: float) -> None:
        """The process exits: call nobody any more; a callback that runs may come to its end until then."""
        if self._loop_thread is not None:
            self._loop_thread.halt(until)

    def _start(self, pump: Coroutine[Any, Any, None]) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run_coroutine_threadsafe(pump, self._fallback_loop())
            return
        task = loop.create_task(pump)
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
        """Raises the error again where it means the pump, or the loop that a caller runs, rather than the request."""
        if context.ends_pump(error):
            raise error
        loop, has_ended = asyncio.get_running_loop(), handle.done()
        if not has_ended:
            self._fail(handle.request_id, error)
        if isinstance(error, SystemExit | KeyboardInterrupt) and not isinstance(threading.current_thread(), LoopThread):
            raise error  # which ends the caller's loop, as from any of its tasks
        if has_ended or not isinstance(error, Exception):
            late = "raised after the request had ended" if has_ended else "raised what ends programs"
            message = f"the callback of request {handle.request_id} {late}"
            loop.call_exception_handler({"message": message, "exception": error})


@dataclass(slots=True)
class _CallbackContext:
    """Where code is that a pump calls, and whatever that calls on other threads or tasks while it waits for it."""

    callbacks: weakref.ref[Callbacks]
    request_id: str
    pump: asyncio.Task[Any] | None
    is_running: bool = False

    async def call(self, callback: Callable[[T], Awaitable[None] | None], item: T) -> None:
        """Call back, and wait for what that returns."""
        self.is_running = True
        try:
            returned = callback(item)
            if inspect.isawaitable(returned):
                await returned
        finally:
            self.is_running = False

    def ends_pump(self, error: BaseException) -> bool:
        """Whether the pump itself was cancelled, or closed by somebody else; a callback may raise such errors too."""
        if isinstance(error, asyncio.CancelledError):
            return self.pump is not None and self.pump.cancelling() > 0
        with contextlib.suppress(RuntimeError):  # no loop runs here
            return isinstance(error, GeneratorExit) and asyncio.current_task() is not self.pump
        return True


# The callback that the code which runs now was called by.
_CURRENT: ContextVar[_CallbackContext | None] = ContextVar("penstock_callback", default=None)


async def _next(handle: RequestHandle) -> Delta | None:
    """The next delta; None at the end, whatever it was: the last delta has told it."""
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
    """What a callback gets of a request that failed before it produced anything."""
    reasons = ((RequestAborted, "abort"), (DeadlineExceeded, "deadline"), (Exception, "error"))
    empty = CompletionOutput(finish_reason=next(name for kind, name in reasons if isinstance(error, kind)))
    return RequestOutput(handle.request_id, handle.prompt, handle.prompt_token_ids, [empty], True, error=text_of(error))
