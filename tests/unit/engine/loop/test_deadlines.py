"""DeadlineTimers expire a request once its deadline has passed, never before, and not after they were cleared."""

from __future__ import annotations

import asyncio
import math

from penstock.api.channel import Channel
from penstock.engine.loop.deadlines import DeadlineTimers
from penstock.engine.requests.request import Request
from penstock.scheduling.admission import QueuePlace

PATIENCE_S = 60.0


class Rig:
    """DeadlineTimers with a clock that only the test moves; the loop's timers run on real time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rung: list[str] = []
        self.bell = asyncio.Event()
        self.asked = asyncio.Event()
        self.timers = DeadlineTimers(self.clock, self.ring)

    def clock(self) -> float:
        """The test's time."""
        self.asked.set()
        return self.now

    def ring(self, request: Request) -> None:
        """Record the request."""
        self.rung.append(request.id)
        self.bell.set()

    def request(self, deadline: float = math.inf, ttft_deadline: float = math.inf) -> Request:
        """A request with that id and nothing else."""
        channel = Channel("a")
        return Request(
            id="a",
            prompt=[1],
            params=None,
            channel=channel,
            arrival=0.0,
            deadline=deadline,
            ttft_deadline=ttft_deadline,
            place=QueuePlace("a", 1),
        )

    async def next_look(self) -> None:
        """Wait until a timer has read the clock."""
        self.asked.clear()
        await asyncio.wait_for(self.asked.wait(), PATIENCE_S)


async def test_alarm_rings_when_the_time_has_come() -> None:
    rig = Rig()
    rig.timers.set(rig.request(deadline=0.001))
    rig.now = 1.0
    await asyncio.wait_for(rig.bell.wait(), PATIENCE_S)
    assert rig.rung == ["a"]


async def test_timer_that_is_early_is_set_again() -> None:
    """Loops round times to milliseconds, and the timer was not set again."""
    rig = Rig()
    rig.timers.set(rig.request(deadline=0.001))
    rig.now = 0.0009
    await rig.next_look()
    assert rig.rung == []
    rig.now = 0.001
    await asyncio.wait_for(rig.bell.wait(), PATIENCE_S)
    assert rig.rung == ["a"]


async def test_first_token_replaces_the_first_token_deadline() -> None:
    rig = Rig()
    request = rig.request(deadline=0.002, ttft_deadline=0.001)
    rig.timers.set(request)
    request.first_token = 0.0005
    rig.now = 0.0015
    await rig.next_look()
    assert rig.rung == []
    rig.now = 0.002
    await asyncio.wait_for(rig.bell.wait(), PATIENCE_S)


async def test_cleared_alarm_is_silent() -> None:
    rig = Rig()
    rig.timers.set(rig.request(deadline=-1.0))
    rig.timers.clear("a")
    rig.timers.clear("a")
    for _ in range(3):
        await asyncio.sleep(0)
    assert rig.rung == []


async def test_request_without_deadlines_sets_no_timer() -> None:
    rig = Rig()
    rig.timers.set(rig.request())
    assert not rig.asked.is_set()
