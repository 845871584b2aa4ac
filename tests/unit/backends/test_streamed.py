"""`StreamedEngine` while it connects: over an engine that never does."""

from __future__ import annotations

import asyncio
import threading

import pytest

from penstock import EngineClosed, ExecutionError, PenstockError
from penstock.api.arguments import Arguments
from penstock.backends.streamed import StreamedEngine, StreamedRequest


class Unreachable(StreamedEngine[None]):
    """An engine that does not answer. `connecting` is set once it is asked."""

    def __init__(self) -> None:
        super().__init__("unreachable")
        self.connecting = threading.Event()
        self.num_closed = 0

    def _prepare(self, arguments: Arguments) -> tuple[None, int]:
        return None, 1

    async def _open(self) -> None:
        self.connecting.set()
        await asyncio.Event().wait()

    async def _close(self) -> None:
        self.num_closed += 1

    async def _stream(self, request: StreamedRequest[None]) -> None:
        raise AssertionError("it was never open")

    def _error_of(self, error: BaseException) -> PenstockError:
        return ExecutionError(str(error))


async def test_stopping_does_not_wait_for_an_engine_that_does_not_answer() -> None:
    engine = Unreachable()
    starting = asyncio.ensure_future(asyncio.to_thread(engine.start))
    assert await asyncio.to_thread(engine.connecting.wait, 60)
    handle = engine.generate([1])
    await asyncio.wait_for(asyncio.to_thread(engine.stop, 0), 60)
    for waiting in (starting, handle):
        with pytest.raises(EngineClosed, match="was stopped"):
            await waiting
    assert engine.num_closed == 1  # what it took until then
