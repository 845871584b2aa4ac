"""For web services: an answer as server-sent events, whose errors show too."""

import json
from collections.abc import AsyncIterator

from penstock import Delta, PenstockError, RequestHandle


async def first_delta(handle: RequestHandle) -> Delta:
    """Wait for the first token: until then, the status can still tell why there is none. Raises `PenstockError`."""
    delta = await anext(handle)
    if delta.finish_reason:
        await handle  # raises the error of a request that ended early
    return delta


async def events(first: Delta, handle: RequestHandle) -> AsyncIterator[str]:
    """The answer from its first delta on. By now the status has been sent, so an error is an event."""
    try:
        yield event("text", first.text)
        async for delta in handle:
            yield event("text", delta.text)
        yield event("done", "")
    except PenstockError as error:  # `DeadlineExceeded`, for instance
        yield event("error", str(error))


def event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
