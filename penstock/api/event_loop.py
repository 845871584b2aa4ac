"""Event loops on the engine's own threads: `new_event_loop` and `LoopThread`.

Never sets an event loop policy. Called by the native engine's host and by `Callbacks`.
"""

from __future__ import annotations

import asyncio
import threading

from penstock.api.exiting import block_loop_thread
from penstock.api.waiting import call_on_loop

# How long `close` waits for tasks that are still running, in seconds.
GRACE_S = 5.0


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A uvloop event loop where uvloop is installed, otherwise a standard one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class LoopThread(threading.Thread):
    """A daemon thread that runs an event loop until `close`."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self.start()

    def close(self, wait: bool) -> None:
        """End the thread once its tasks are done, after at most `GRACE_S` seconds; with `wait`, join it."""
        call_on_loop(self.loop, self._closing.set)
        if wait and threading.current_thread() is not self:
            self.join(2 * GRACE_S)

    def halt(self, until: float) -> None:
        """Block the thread forever, because the process exits."""
        block_loop_thread(self.loop, self, until)

    def run(self) -> None:
        """Run the event loop. Called by `threading`."""
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        await self._closing.wait()
        if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(tasks, timeout=GRACE_S)
