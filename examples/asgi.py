"""What a framework would do for web_service.py: read bodies, write answers."""

import math
from collections.abc import AsyncIterator
from typing import Any

from penstock import EngineOverloaded, PenstockError


async def read_body(receive: Any) -> str:
    """The whole body, which a server passes on in pieces. Of a client that leaves early, what came until then."""
    body = bytearray()
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body.decode(errors="replace")


async def send_text(send: Any, status: int, text: str, headers: Any = ()) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


async def send_error(send: Any, error: PenstockError) -> None:
    """400 for a refused prompt, 429 for a full queue, 503 for a stopped engine, 504 for a missed deadline."""
    headers = []
    if isinstance(error, EngineOverloaded):
        headers.append((b"retry-after", str(math.ceil(error.retry_after_s)).encode()))
    await send_text(send, error.http_status, str(error), headers)


async def send_events(send: Any, events: AsyncIterator[str]) -> None:
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async for event in events:
        await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
    await send({"type": "http.response.body"})
