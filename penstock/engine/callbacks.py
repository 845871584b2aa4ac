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

from penstock.engine.handle import RequestHandle
from penstock.errors import PenstockError
from penstock.outputs import CompletionOutput, Delta, RequestOutput

Fail = Callable[[str, Exception], None]


class Callbacks:
    """Starts pumps and keeps them alive. `fail(request_id, error)` ends a request whose callback raised."""

    def __init__(self, fail: Fail) -> None:
        self._fail = fail
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def stream(self, handle: RequestHandle, callback: Callable[[Delta], Awaitable[None] | None]) -> None:
        """Call `callback(delta)` for every delta; the last one has a finish reason."""
        self._start(self._guard(handle.request_id, _stream(handle, callback)))

    def finish(self, handle: RequestHandle, callback: Callable[[RequestOutput], Awaitable[None] | None]) -> None:
        """Call `callback(output)` once, at the end, however the request ends."""
        self._start(self._guard(handle.request_id, _finish(handle, callback)))

    def close(self) -> None:
        """Stop the thread for callers without a loop."""
        with self._lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._loop = None

    async def _guard(self, request_id: str, pump: Coroutine[Any, Any, None]) -> None:
        try:
            await pump
        except PenstockError:
            return
        except Exception as error:
            self._fail(request_id, error)

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
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run_forever, args=(self._loop,), name="penstock-callbacks", daemon=True).start()
            return self._loop


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _stream(handle: RequestHandle, callback: Callable[[Delta], Awaitable[None] | None]) -> None:
    async for delta in handle:
        await _settle(callback(delta))


async def _finish(handle: RequestHandle, callback: Callable[[RequestOutput], Awaitable[None] | None]) -> None:
    try:
        output = await handle
    except PenstockError as error:
        output = getattr(error, "output", None) or _empty(handle, error)
    await _settle(callback(output))


async def _settle(returned: Awaitable[None] | None) -> None:
    if inspect.isawaitable(returned):
        await returned


def _empty(handle: RequestHandle, error: PenstockError) -> RequestOutput:
    """What a callback gets of a request that failed before it produced anything."""
    nothing = CompletionOutput(finish_reason="error")
    return RequestOutput(handle.request_id, handle.prompt, handle.prompt_token_ids, [nothing], True, error=str(error))
