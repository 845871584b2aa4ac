"""`EventStream`: a response of server-sent events that is never silent for long and ends with its client.

The headers leave before the first frame. A comment (or an API's own ping) is sent whenever nothing else was for a
while. A client that leaves cancels the generation at once. Frames are bytes; nothing here knows what they say.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

COMMENT = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def frame(value: Mapping[str, object]) -> bytes:
    """A data frame."""
    return b"data: %b\n\n" % to_json(value, inf_nan_mode="null")


def named_frame(event: str, value: Mapping[str, object]) -> bytes:
    """A data frame with the name of its event."""
    return b"event: %b\ndata: %b\n\n" % (event.encode(), to_json(value, inf_nan_mode="null"))


class EventStream(Response):
    """Sends frames. `cancel()` is called when the client leaves, and in any case at the end."""

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        cancel: Callable[[], None],
        *,
        ping: bytes = COMMENT,
        interval_s: float = 5.0,
    ) -> None:
        super().__init__(None, headers=_HEADERS)
        del self.headers["content-length"]
        self._frames = frames
        self._cancel = cancel
        self._ping = ping
        self._interval_s = interval_s
        self._last_sent = 0.0
        self._is_sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response. A task of its own sends the frames, so that a frame resumes no middleware."""
        tasks: list[asyncio.Task[None]] = []
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            self._last_sent = time.monotonic()
            coroutines = watch(receive, self._cancel), self._keep_alive(send), self._send_frames(send)
            tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
            await tasks[-1]
            await send({"type": "http.response.body", "body": b""})
        except OSError:
            pass  # the client has left
        finally:
            self._cancel()
            for task in tasks:
                task.cancel()

    async def _send_frames(self, send: Send) -> None:
        async with contextlib.aclosing(self._frames) as frames:
            async for data in frames:
                await self._send(send, data)

    async def _send(self, send: Send, data: bytes) -> None:
        self._is_sending = True
        try:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        finally:
            self._is_sending, self._last_sent = False, time.monotonic()

    async def _keep_alive(self, send: Send) -> None:
        """Send pings. A send that waits for a slow client is not silence."""
        with contextlib.suppress(OSError):
            while True:
                pause = self._last_sent + self._interval_s - time.monotonic()
                if pause > 0 or self._is_sending:
                    await asyncio.sleep(max(pause, 0.05))
                else:
                    await self._send(send, self._ping)


async def watch(receive: Receive, cancel: Callable[[], None]) -> None:
    """Cancel when the client leaves. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    cancel()


@contextlib.asynccontextmanager
async def cancelled_on_disconnect(receive: Receive, cancel: Callable[[], None]) -> AsyncIterator[None]:
    """Cancel if the client leaves inside this block; also when the block raises."""
    watcher = asyncio.create_task(watch(receive, cancel))
    try:
        yield
    except BaseException:
        cancel()
        raise
    finally:
        watcher.cancel()
