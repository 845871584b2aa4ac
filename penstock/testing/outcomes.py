"""What becomes of a request, for the contracts. Waits for what has to happen, and measures no time that it takes alone.

Called by `EngineContract`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from penstock.api.handle import RequestHandle
from penstock.errors import RequestError
from penstock.outputs import RequestOutput

PATIENCE_S = 30.0
ATTEMPTS = 10  # at ending a request while it runs: on a busy machine it may complete before its caller gets a turn


async def output_of(handle: RequestHandle) -> RequestOutput:
    """The result; what a handle is to a task."""
    return await handle


async def tokens_of(handle: RequestHandle) -> list[int]:
    """The tokens of all deltas."""
    return [token async for delta in handle for token in delta.token_ids]


async def error_of(handle: RequestHandle) -> Exception | None:
    """The error of a request; None if it completed."""
    try:
        await asyncio.wait_for(output_of(handle), PATIENCE_S)
    except Exception as error:
        return error
    return None


async def nothing(handle: RequestHandle) -> None:
    """An `end` for `ended`, of requests that end by themselves."""


async def ended(
    generate: Callable[[], RequestHandle], end: Callable[[RequestHandle], Awaitable[None]]
) -> tuple[RequestHandle, Exception]:
    """A request that `end` has ended while it ran, and its error. Raises `AssertionError` if all complete before."""
    for _ in range(ATTEMPTS):
        handle = generate()
        await end(handle)
        if (error := await error_of(handle)) is not None:
            return handle, error
    raise AssertionError("every request completed before it could be ended")


async def seconds_until_accepted(generate: Callable[[], RequestHandle]) -> float:
    """How long it takes until a request is no longer refused, and has been served."""
    begin_s = time.monotonic()
    while True:
        try:
            await generate()
        except RequestError:
            await asyncio.sleep(0.01)
        else:
            return time.monotonic() - begin_s
