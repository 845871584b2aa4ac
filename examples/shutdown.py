"""For web services: end open requests when the server is told to stop.

Servers such as uvicorn first wait for their open streams, and end the lifespan, which closes the engine, after that.
"""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType

from penstock import InferenceEngine

DRAIN_S = 5.0


@asynccontextmanager
async def closed_by_signals(engine: InferenceEngine) -> AsyncIterator[None]:
    """At Ctrl-C and SIGTERM, open requests have `DRAIN_S` seconds left; the second time, none.

    What has not finished by then ends with `EngineClosed`. The server's own handlers run too.
    """
    loop, closing = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    is_main = threading.current_thread() is threading.main_thread()  # no other thread can handle signals
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if is_main}

    def close(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(lambda: closing.add(loop.create_task(engine.aclose(0.0 if closing else DRAIN_S))))
        if callable(handler := handlers[signal.Signals(number)]):
            handler(number, frame)

    for number in handlers:
        signal.signal(number, close)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
