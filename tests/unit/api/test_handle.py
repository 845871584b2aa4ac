"""The handle owns its request: cancelling, closing or dropping it aborts the request, and nothing else does."""

from __future__ import annotations

import asyncio
import gc

import pytest

from penstock.api.channel import Channel, RequestStatus
from penstock.api.handle import RequestHandle
from penstock.api.transcript import Transcript
from penstock.api.waiting import Wakeups
from penstock.errors import RequestAborted
from penstock.outputs import CompletionOutput, RequestOutput

OUTPUT = RequestOutput("a", "text", [1], [CompletionOutput()], True)


class Engine:
    """Records the aborted ids."""

    def __init__(self) -> None:
        self.aborted: list[str] = []

    def abort(self, request_id: str) -> None:
        """Record the id."""
        self.aborted.append(request_id)


def make() -> tuple[RequestHandle, Channel, Engine]:
    """A handle, its channel and its engine."""
    engine, channel = Engine(), Channel("a")
    return RequestHandle(channel, engine), channel, engine


def said(text: str, index: int = 0) -> Transcript:
    """A transcript with some text."""
    transcript = Transcript("a", index)
    transcript.add(text, ())
    return transcript


def finish(channel: Channel, *transcripts: Transcript, error: BaseException | None = None) -> None:
    """End the request as the engine's thread does."""
    wakeups = Wakeups()
    for transcript in transcripts:
        channel.put(transcript, wakeups)
    status = RequestStatus.FAILED if error else RequestStatus.COMPLETED
    channel.end(status, None if error else OUTPUT, error, wakeups)
    wakeups.send()


async def test_awaiting_gives_the_result_any_number_of_times() -> None:
    handle, channel, engine = make()
    finish(channel)
    assert await handle is OUTPUT
    assert await handle is OUTPUT
    assert handle.result(0) is OUTPUT
    del handle
    assert engine.aborted == []


async def test_iterating_gives_the_deltas_and_stops() -> None:
    handle, channel, _ = make()
    finish(channel, said("x"), said("y", 1))
    assert [delta.text async for delta in handle] == ["x", "y"]
    assert [delta async for delta in handle] == []


async def test_iterating_raises_the_error_after_the_deltas() -> None:
    handle, channel, _ = make()
    finish(channel, said("x"), error=RequestAborted("gone"))
    assert (await anext(handle)).text == "x"
    with pytest.raises(RequestAborted):
        await anext(handle)


async def test_cancelling_the_waiting_task_aborts() -> None:
    handle, _, engine = make()
    task = asyncio.ensure_future(handle)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.aborted == ["a"]


async def test_cancelling_the_reading_task_aborts() -> None:
    handle, _, engine = make()

    async def read() -> None:
        async for _ in handle:
            pass

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.aborted == ["a"]


async def test_timeout_aborts() -> None:
    handle, _, engine = make()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await handle
    assert engine.aborted == ["a"]


async def test_failing_sibling_in_a_task_group_aborts() -> None:
    handle, _, engine = make()

    async def wait() -> None:
        await handle

    async def fail() -> None:
        raise ValueError

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(wait())
            group.create_task(fail())

    with pytest.raises(ExceptionGroup):
        await both()
    assert engine.aborted == ["a"]


async def test_closing_and_leaving_the_context_abort() -> None:
    handle, _, engine = make()
    await handle.aclose()
    async with handle:
        pass
    assert engine.aborted == ["a", "a"]


def test_dropping_the_last_reference_aborts() -> None:
    handle, _, engine = make()
    del handle
    assert engine.aborted == ["a"]


def test_being_collected_in_a_cycle_aborts() -> None:
    handle, _, engine = make()
    cycle: list[object] = [handle]
    cycle.append(cycle)
    del handle, cycle
    gc.collect()
    assert engine.aborted == ["a"]


async def test_breaking_out_of_the_loop_aborts_when_no_reference_to_the_handle_is_left() -> None:
    engine, channel = Engine(), Channel("a")
    wakeups = Wakeups()
    channel.put(Transcript("a"), wakeups)
    async for _ in RequestHandle(channel, engine):
        break
    assert engine.aborted == ["a"]


def test_detached_handle_lets_the_request_live() -> None:
    handle, _, engine = make()
    assert handle.detach() is handle
    del handle
    assert engine.aborted == []


async def test_ended_request_is_never_aborted() -> None:
    handle, channel, engine = make()
    finish(channel)
    handle.cancel()
    await handle.aclose()
    del handle
    assert engine.aborted == []


def test_handle_shows_what_is_known() -> None:
    handle, channel, _ = make()
    assert (handle.request_id, handle.status, handle.done()) == ("a", RequestStatus.QUEUED, False)
    channel.prompt, channel.prompt_token_ids = "text", [1]
    assert (handle.prompt, handle.prompt_token_ids) == ("text", [1])
    assert repr(handle) == "<RequestHandle a queued>"
    with pytest.raises(TimeoutError):
        handle.result(0)
    finish(channel)
    assert handle.done()
