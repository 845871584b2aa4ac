"""Callbacks instead of iteration: a pump per request that feeds its deltas, or its result, to a function.

Runs on the loop that submitted the request, or, for callers without a loop, on a thread of its own; never on the
engine's thread and never under a lock, so a callback may call back into the engine. A raising callback ends its
request alone.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from penstock.engine.exiting import park
from penstock.engine.handle import RequestHandle
from penstock.errors import DeadlineExceeded, RequestAborted
from penstock.outputs import CompletionOutput, Delta, RequestOutput

# How long `close` waits for callbacks that are still running, in seconds.
GRACE_S = 5.0
Fail = Callable[[str, Exception], None]


class Callbacks:
    """Starts pumps and keeps them alive. `fail(request_id, error)` ends a request whose callback raised.

    What a callback raises after its request has ended goes to the loop's exception handler, which logs it.
    """

    def __init__(self, fail: Fail) -> None:
        self._fail = fail
        self._tasks: set[asyncio.Task[None]] = set()
        self._own: _OwnLoop | None = None
        self._lock = threading.Lock()

    def stream(self, handle: RequestHandle, callback: Callable[[Delta], Awaitable[None] | None]) -> None:
        """Call `callback(delta)` for every delta; the last one has a finish reason."""
        self._start(self._stream(handle, callback))

    def finish(self, handle: RequestHandle, callback: Callable[[RequestOutput], Awaitable[None] | None]) -> None:
        """Call `callback(output)` once, at the end, however the request ends."""
        self._start(self._finish(handle, callback))

    def close(self) -> None:
        """End the thread for callers without a loop once its callbacks are done; waits a few seconds for that."""
        with self._lock:
            own, self._own = self._own, None
        if own is not None:
            own.close()

    def rest(self, until: float) -> None:
        """The process exits: call nobody any more; a callback that runs may come to its end until then."""
        if self._own is not None:
            self._own.rest(until)

    def _start(self, pump: Coroutine[Any, Any, None]) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run_coroutine_threadsafe(pump, self._own_loop())
            return
        task = loop.create_task(pump)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._own is None:
                self._own = _OwnLoop()
            return self._own.loop

    async def _stream(self, handle: RequestHandle, callback: Callable[[Delta], Awaitable[None] | None]) -> None:
        while (delta := await _next(handle)) is not None:
            try:
                await _settle(callback(delta))
            except Exception as error:
                self._raised(handle, error)
                return

    async def _finish(self, handle: RequestHandle, callback: Callable[[RequestOutput], Awaitable[None] | None]) -> None:
        output = await _outcome(handle)
        try:
            await _settle(callback(output))
        except Exception as error:
            self._raised(handle, error)

    def _raised(self, handle: RequestHandle, error: Exception) -> None:
        if handle.done():
            message = f"the callback of request {handle.request_id} raised after the request had ended"
            asyncio.get_running_loop().call_exception_handler({"message": message, "exception": error})
        else:
            self._fail(handle.request_id, error)


class _OwnLoop:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="penstock-callbacks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; from any other one, wait for it."""
        self.loop.call_soon_threadsafe(self._closing.set)
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * GRACE_S)

    def rest(self, until: float) -> None:
        """Let the thread wait for ever."""
        park(self.loop, self._thread, until)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._live())

    async def _live(self) -> None:
        await self._closing.wait()
        if pumps := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(pumps, timeout=GRACE_S)


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


async def _settle(returned: Awaitable[None] | None) -> None:
    if inspect.isawaitable(returned):
        await returned


def _empty(handle: RequestHandle, error: Exception) -> RequestOutput:
    """What a callback gets of a request that failed before it produced anything."""
    reasons = ((RequestAborted, "abort"), (DeadlineExceeded, "deadline"), (Exception, "error"))
    nothing = CompletionOutput(finish_reason=next(name for kind, name in reasons if isinstance(error, kind)))
    return RequestOutput(handle.request_id, handle.prompt, handle.prompt_token_ids, [nothing], True, error=str(error))
