"""The gate between two steps, on the test's own loop: what an order finds there, and what runs meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import pytest

from penstock.api.channel import RequestStatus
from penstock.engine.loop.gate import ALLOWED, EngineState
from penstock.errors import EngineClosed, EngineStateError, RequestAborted
from tests.unit.engine.loop.test_core import Rig

TURNS = 20  # of the loop: more than two steps take


@asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[Rig]:
    """Serve while the block runs, then until all requests have ended."""
    task = asyncio.ensure_future(rig.core.run())
    yield rig
    rig.core.stop()
    await asyncio.wait_for(task, 30)


def ordered(rig: Rig, order: Coroutine[Any, Any, None]) -> Future[None]:
    """Give an order, as an action from another thread does."""
    outcome = Future[None]()
    rig.core.gate.start(order, outcome)
    return outcome


async def turns(count: int = TURNS) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def done(outcome: Future[None]) -> None:
    """Wait for the end of an order, and raise its error."""
    await asyncio.wait_for(asyncio.wrap_future(outcome), 30)


async def test_an_order_waits_for_the_running_step_and_no_longer() -> None:
    rig = Rig()
    gate = rig.core.gate
    channel = rig.submit(max_tokens=40)
    async with running(rig):
        await rig.planned.wait()
        rig.trace.clear()
        outcome = ordered(rig, gate.begin_update("keep"))
        await done(outcome)
        assert rig.trace.count("plan") == 0
        assert rig.trace.count("commit") == 1
        assert gate.state is EngineState.UPDATING
        num_plans = len(rig.plans)
        await turns()
        assert len(rig.plans) == num_plans
        rig.planned.clear()
        await done(ordered(rig, gate.end_update(False)))
        assert gate.state is EngineState.RUNNING
        await rig.planned.wait()
        (row,) = rig.plans[num_plans].rows
        assert (row.start, row.end) == (0, len(row.tokens)), "its K/V are computed again"
    assert channel.outcome().outputs[0].weight_versions == [0, *[1] * 39]


async def test_an_order_right_after_the_gate_opened_gets_the_steps_that_it_waits_for() -> None:
    """The loop had not noticed that the gate was open for a moment, and ran no step that the second order waits for."""
    rig = Rig()
    gate = rig.core.gate
    channel = rig.submit(max_tokens=10)
    async with running(rig):
        await rig.planned.wait()
        await done(ordered(rig, gate.pause("keep")))
        resumed, updated = ordered(rig, gate.resume()), ordered(rig, gate.update(None, "wait", False))
        await done(resumed)
        await done(updated)
    assert channel.outcome().outputs[0].weight_versions == [0] * 10


async def test_requests_that_have_not_started_are_held_while_others_end() -> None:
    rig = Rig(max_batch_size=1)
    gate = rig.core.gate
    first, second = rig.submit(name="a", max_tokens=8), rig.submit(name="b", max_tokens=2)
    async with running(rig):
        await rig.planned.wait()
        outcome = ordered(rig, gate.update(None, "wait", False))
        await turns(3)
        third = rig.submit(name="c", max_tokens=2)
        await done(outcome)
        assert first.ended
        assert not second.ended
    versions = [channel.outcome().outputs[0].weight_versions for channel in (first, second, third)]
    assert versions == [[0] * 8, [1] * 2, [1] * 2]
    assert rig.is_clean()


async def test_a_held_request_can_be_aborted() -> None:
    rig = Rig(max_batch_size=1)
    first, second = rig.submit(name="a", max_tokens=8), rig.submit(name="b", max_tokens=2)
    async with running(rig):
        await rig.planned.wait()
        outcome = ordered(rig, rig.core.gate.pause("wait"))
        await turns(2)
        rig.core.abort("b")
        await done(outcome)
        await done(ordered(rig, rig.core.gate.resume()))
    assert len(first.outcome().generated_ids) == 8
    with pytest.raises(RequestAborted):
        second.outcome()
    assert rig.is_clean()


async def test_an_idle_engine_stops_at_once() -> None:
    rig = Rig()
    async with running(rig):
        await turns()
        await done(ordered(rig, rig.core.gate.pause("wait")))
        channel = rig.submit()
        await turns()
        assert channel.status is RequestStatus.QUEUED
        await done(ordered(rig, rig.core.gate.resume()))
    assert len(channel.outcome().generated_ids) == 2


async def test_an_aborting_order_ends_what_runs_before_the_step_does() -> None:
    rig = Rig()
    channel = rig.submit(max_tokens=40)
    async with running(rig):
        await rig.planned.wait()
        outcome = ordered(rig, rig.core.gate.pause("abort"))
        await turns(1)
        assert channel.ended
        await done(outcome)
        await done(ordered(rig, rig.core.gate.resume()))
    assert rig.is_clean()


async def test_an_order_that_waits_when_the_loop_ends_is_told() -> None:
    rig = Rig()
    rig.submit(max_tokens=40)
    loop = asyncio.get_running_loop()
    task = loop.create_task(rig.core.run())
    await rig.planned.wait()
    outcome = ordered(rig, rig.core.gate.update(None, "wait", False))
    await turns(3)
    for other in asyncio.all_tasks() - {asyncio.current_task(), task}:
        other.cancel()  # as a runner does with the tasks that are left
    await turns(3)
    assert isinstance(outcome.exception(), EngineClosed)
    rig.core.stop()
    await asyncio.wait_for(task, 30)


@pytest.mark.parametrize("num_turns", range(12))
async def test_an_order_whose_caller_leaves_has_no_effect_or_ends(num_turns: int) -> None:
    """At whatever moment: before it began, while it reads, while it waits, or when it has just succeeded."""
    rig = Rig()
    gate = rig.core.gate
    channel = rig.submit(max_tokens=60)
    async with running(rig):
        await rig.planned.wait()
        outcome = ordered(rig, gate.begin_update("keep"))
        await turns(num_turns)
        gate.cancel(outcome)
        await turns()
        assert gate.state is EngineState.RUNNING
        assert outcome.done()
        await done(ordered(rig, gate.update(None, "keep", False)))
    assert channel.outcome().outputs[0].weight_versions[-1] == 1


async def test_leaving_an_order_that_has_ended_leaves_a_later_one_alone() -> None:
    rig = Rig()
    gate = rig.core.gate
    async with running(rig):
        first = ordered(rig, gate.begin_update("keep"))
        await done(first)
        end = ordered(rig, gate.end_update(False))
        await done(end)
        second = ordered(rig, gate.begin_update("keep"))
        await done(second)
        for outcome in (first, end):
            gate.cancel(outcome)
        assert gate.state is EngineState.UPDATING
        with pytest.raises(EngineStateError, match="updating"):
            await done(ordered(rig, gate.pause("keep")))
        await done(ordered(rig, gate.end_update(False)))


def test_no_order_fits_an_engine_that_is_being_changed_or_is_mixed() -> None:
    allowing = {state for states in ALLOWED.values() for state in states}
    assert set(EngineState) - allowing == {EngineState.CHANGING, EngineState.UPDATING, EngineState.MIXED}
