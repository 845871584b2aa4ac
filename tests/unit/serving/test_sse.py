"""`EventStream`: pings in silence, an end with the client, nothing left running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from penstock.serving.sse import DONE, EventStream, cancelled_on_disconnect, frame, named_frame


class Connection:
    """ASGI's two functions, and what was sent."""

    def __init__(self, fails: bool = False) -> None:
        self.left = asyncio.Event()
        self.bodies: list[bytes] = []
        self.has_pings = asyncio.Event()
        self.started = asyncio.Event()
        self.has_body = asyncio.Event()
        self._fails = fails

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.started.set()
        else:
            if self._fails:
                raise OSError("the client has left")
            self.bodies.append(message["body"])
            self.has_body.set()
            if self.bodies.count(b"ping") >= 3:
                self.has_pings.set()


class Frames:
    """Frames that come when they are told to; `is_closed` once nothing more will be read."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.is_closed = False
        self.num_cancels = 0
        self.is_cancelled = asyncio.Event()

    def cancel(self) -> None:
        self.num_cancels += 1
        self.is_cancelled.set()
        self.queue.put_nowait(None)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        try:
            while (data := await self.queue.get()) is not None:
                yield data
        finally:
            self.is_closed = True


async def finished(task: asyncio.Task[None]) -> None:
    await asyncio.wait_for(task, 60)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_headers_leave_before_the_first_frame_and_silence_is_filled() -> None:
    frames, connection = Frames(), Connection()
    response = EventStream(frames.stream(), frames.cancel, ping=b"ping", interval_s=0.02)
    task = asyncio.create_task(response({}, connection.receive, connection.send))
    await connection.started.wait()
    await connection.has_pings.wait()
    assert set(connection.bodies) == {b"ping"}
    frames.queue.put_nowait(b"a")
    frames.queue.put_nowait(None)
    await finished(task)
    assert [body for body in connection.bodies if body != b"ping"] == [b"a", b""]


async def test_a_stream_that_says_something_is_not_pinged() -> None:
    frames, connection = Frames(), Connection()
    task = asyncio.create_task(EventStream(frames.stream(), frames.cancel)({}, connection.receive, connection.send))
    for number in range(5):
        frames.queue.put_nowait(b"%d" % number)
    frames.queue.put_nowait(None)
    await finished(task)
    assert connection.bodies == [b"0", b"1", b"2", b"3", b"4", b""]


async def test_frames_are_made_and_sent_in_a_task_of_their_own() -> None:
    """A task that middleware wraps resumes every frame of the middleware for every event."""
    connection, tasks = Connection(), set[Any]()

    async def stream() -> AsyncGenerator[bytes, None]:
        for _ in range(2):
            tasks.add(asyncio.current_task())
            yield b"a"

    task = asyncio.create_task(EventStream(stream(), lambda: None)({}, connection.receive, connection.send))
    await finished(task)
    assert len(tasks) == 1
    assert tasks != {task}


async def test_a_response_that_is_cancelled_has_closed_its_frames_when_it_ends() -> None:
    frames, connection = Frames(), Connection()
    task = asyncio.create_task(EventStream(frames.stream(), frames.cancel)({}, connection.receive, connection.send))
    frames.queue.put_nowait(b"a")
    await connection.has_body.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert frames.is_closed
    assert frames.num_cancels >= 1


async def test_a_client_that_leaves_cancels() -> None:
    frames, connection = Frames(), Connection()
    task = asyncio.create_task(EventStream(frames.stream(), frames.cancel)({}, connection.receive, connection.send))
    await connection.started.wait()
    connection.left.set()
    await finished(task)
    assert frames.num_cancels >= 1
    assert frames.is_closed


@pytest.mark.parametrize("fails", [True, False])
async def test_an_error_while_sending_or_reading_cancels(fails: bool) -> None:
    frames, connection = Frames(), Connection(fails)

    async def broken() -> AsyncGenerator[bytes, None]:
        yield b"a"
        raise ValueError("boom")

    stream = frames.stream() if fails else broken()
    task = asyncio.create_task(EventStream(stream, frames.cancel)({}, connection.receive, connection.send))
    frames.queue.put_nowait(b"a")
    if fails:
        await finished(task)  # the client has left: that is no error
    else:
        with pytest.raises(ValueError, match="boom"):
            await task
    assert frames.num_cancels == 1


async def test_an_answer_at_once_is_cancelled_too() -> None:
    frames, connection = Frames(), Connection()
    async with cancelled_on_disconnect(connection.receive, frames.cancel):
        await asyncio.sleep(0)
    assert frames.num_cancels == 0
    with pytest.raises(ValueError, match="boom"):
        async with cancelled_on_disconnect(connection.receive, frames.cancel):
            raise ValueError("boom")
    assert frames.num_cancels == 1
    frames.is_cancelled.clear()
    connection.left.set()
    async with cancelled_on_disconnect(connection.receive, frames.cancel):
        await frames.is_cancelled.wait()


def test_frames_are_one_line_of_json_each() -> None:
    assert frame({"a": "x\n\ny", "b": float("nan")}) == b'data: {"a":"x\\n\\ny","b":null}\n\n'
    assert named_frame("ping", {}) == b"event: ping\ndata: {}\n\n"
    assert DONE == b"data: [DONE]\n\n"
