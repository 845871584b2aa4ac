"""What a server does and says between the first signal and its end."""

from __future__ import annotations

import asyncio

from penstock.serving import ServingSettings
from penstock.serving.draining import REPORT_S, Drain
from penstock.serving.lifecycle import Lifecycle


class Rig:
    """A drain whose pauses last until the test ends them."""

    def __init__(self, **settings: float) -> None:
        self.lines: list[str] = []
        self.has_ended = asyncio.Event()
        self.pauses: asyncio.Queue[tuple[float, asyncio.Event]] = asyncio.Queue()
        self.lifecycle = Lifecycle(10)
        options = ServingSettings(**{"drain_timeout_s": 12.0, **settings})  # type: ignore[arg-type]
        self.drain = Drain(self.lifecycle, options, self.lines.append, self.has_ended.set, self.sleep)

    async def sleep(self, seconds: float) -> None:
        await self.pauses.put((seconds, over := asyncio.Event()))
        await over.wait()

    async def next_pause(self) -> float:
        """Wait for the next pause, end it, and return its seconds."""
        seconds, over = await self.pauses.get()
        over.set()
        return seconds


async def test_it_says_again_and_again_what_it_waits_for() -> None:
    rig = Rig()
    with rig.lifecycle.call():
        rig.drain.signal()
        assert [await rig.next_pause() for _ in range(3)] == [REPORT_S, REPORT_S, 12 - 2 * REPORT_S]
        assert [line.split(";")[0] for line in rig.lines] == [
            f"shutting down: waiting for 1 open request, for at most {seconds} s" for seconds in (12, 7, 2)
        ]
        assert not rig.has_ended.is_set()
    await rig.has_ended.wait()


async def test_an_idle_server_ends_without_a_word() -> None:
    rig = Rig()
    rig.drain.signal()
    await rig.has_ended.wait()
    assert not rig.lines


async def test_requests_that_take_too_long_are_aborted_and_counted() -> None:
    rig = Rig(drain_timeout_s=0.0)
    is_aborted = asyncio.Event()
    with rig.lifecycle.call(), rig.lifecycle.abortable(is_aborted.set, "a"):
        rig.drain.signal()
        await is_aborted.wait()
    await rig.has_ended.wait()
    assert rig.lines == ["aborted 1 open request after 0 s (drain_timeout_s)"]


async def test_a_second_signal_aborts_and_a_third_one_waits_for_nothing() -> None:
    rig = Rig(drain_delay_s=30.0)
    is_aborted = asyncio.Event()
    with rig.lifecycle.call(), rig.lifecycle.abortable(is_aborted.set, "a"):
        rig.drain.signal()
        await rig.pauses.get()
        assert not rig.lifecycle.is_ready
        assert not rig.lifecycle.is_draining
        rig.drain.signal()
        await is_aborted.wait()
        assert not rig.has_ended.is_set()  # its client is still being told
        rig.drain.signal()
        assert rig.has_ended.is_set()
    assert rig.lines[1:] == ["aborting 1 open request"]
