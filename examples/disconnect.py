"""For web services: end a request as soon as its client leaves. Frameworks do not do that while a handler runs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from penstock import RequestHandle


@asynccontextmanager
async def cancelled_on_disconnect(handle: RequestHandle, receive: Any) -> AsyncIterator[None]:
    """Cancel the request if its client leaves inside this block. `receive` is ASGI's; the body has been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        handle.cancel()  # whoever reads the handle gets `RequestAborted`

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
