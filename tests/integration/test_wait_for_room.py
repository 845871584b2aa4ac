"""`await engine.wait_for_room()`: producers that wait instead of being refused, from any loop, until it ends."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
import trio

from penstock import (
    EngineClosed,
    EngineOverloaded,
    InferenceEngine,
    RequestError,
    RequestPriority,
    SamplingParams,
    ScriptedModel,
)

PATIENCE_S = 30.0
FEW = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=4000, ignore_eos=True)
Make = Callable[..., tuple[InferenceEngine, ScriptedModel]]


@pytest.fixture
def make() -> Iterator[Make]:
    engines: list[InferenceEngine] = []

    def build(**settings: Any) -> tuple[InferenceEngine, ScriptedModel]:
        model = ScriptedModel([5, 6, 7], max_length=8192)
        engines.append(InferenceEngine(model, None, **{"max_batch_size": 1, "batch_timeout_ms": 0, **settings}))
        return engines[-1], model

    yield build
    for engine in engines:
        engine.stop(0.0)


def fill(engine: InferenceEngine, model: ScriptedModel, count: int = 1, **arguments: Any) -> None:
    """One request runs, and does not get on; so many wait behind it."""
    model.hold()
    handle = engine.generate([1], FEW).detach()
    while handle.status.value == "queued":
        threading.Event().wait(0.001)
    for _ in range(count):
        engine.generate([1], FEW, **arguments).detach()


async def produce(engine: InferenceEngine, number: int, refusals: list[int]) -> list[int]:
    """Submit one request as soon as there is room; note every refusal."""
    while True:
        await engine.wait_for_room([number + 1])
        try:
            handle = engine.generate([number + 1], FEW)
        except EngineOverloaded:
            refusals.append(number)
        else:
            return (await handle).generated_ids


async def test_200_producers_lose_nothing_and_are_never_refused(make: Make) -> None:
    engine, _ = make(max_queue_size=4, max_batch_size=4)
    refusals: list[int] = []
    outputs = await asyncio.wait_for(
        asyncio.gather(*(produce(engine, number, refusals) for number in range(200))), PATIENCE_S
    )
    assert outputs == [[5, 6, 7]] * 200
    assert refusals == []
    queue = engine.get_stats()["queue"]
    assert (queue["num_requests"], queue["num_queued_requests"]) == (0, 0)


def test_200_producers_on_four_loops_of_two_kinds_lose_nothing_and_are_refused_briefly_at_most(make: Make) -> None:
    engine, _ = make(max_queue_size=4, max_batch_size=4)
    refusals: list[int] = []
    outputs: list[list[int]] = []

    async def many() -> None:
        async def one(number: int) -> None:
            outputs.append(await produce(engine, number, refusals))

        async with anyio.create_task_group() as group:
            for number in range(50):
                group.start_soon(one, number)

    threads = [
        threading.Thread(target=anyio.run, args=(many,), kwargs={"backend": backend}, daemon=True)
        for backend in ("asyncio", "trio", "asyncio", "trio")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert outputs == [[5, 6, 7]] * 200
    assert len(refusals) < 200, "another loop is faster now and then, and not as a rule"


async def test_the_prompt_and_the_class_decide_whether_there_is_room(make: Make) -> None:
    engine, model = make(max_queued_tokens=100)
    fill(engine, model)
    engine.generate([1] * 60, FEW).detach()
    await asyncio.wait_for(engine.wait_for_room([1] * 39), PATIENCE_S)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.wait_for_room([1] * 40), 0.05)
    await asyncio.wait_for(engine.wait_for_room([1] * 40, priority=RequestPriority.HIGH), PATIENCE_S)
    model.release()
    await asyncio.wait_for(engine.wait_for_room([1] * 200), PATIENCE_S)


@pytest.mark.parametrize("arguments", [{"prompt": 3.5}, {"priority": 9}])
async def test_what_generate_would_refuse_is_refused(make: Make, arguments: dict[str, Any]) -> None:
    engine, _ = make()
    with pytest.raises(RequestError):
        await engine.wait_for_room(**arguments)


async def test_stopping_tells_waiters_at_once_and_not_after_the_drain(make: Make) -> None:
    engine, model = make(max_queue_size=1)
    fill(engine, model)
    waiting = [asyncio.create_task(engine.wait_for_room()) for _ in range(3)]
    await asyncio.sleep(0)
    stopping = asyncio.create_task(engine.aclose(PATIENCE_S))
    for task in waiting:
        with pytest.raises(EngineClosed, match="the engine was stopped"):
            await asyncio.wait_for(task, PATIENCE_S)
    assert not stopping.done()
    model.release()
    await stopping
    with pytest.raises(EngineClosed):
        await engine.wait_for_room()


def test_cancelling_a_trio_scope_ends_the_wait(make: Make) -> None:
    engine, model = make(max_queue_size=1)
    fill(engine, model)

    async def main() -> None:
        with trio.move_on_after(0.02) as scope:
            await engine.wait_for_room()
        assert scope.cancelled_caught
        model.release()
        with trio.fail_after(PATIENCE_S):
            await engine.wait_for_room()

    trio.run(main)


def test_an_engine_with_waiters_is_collected() -> None:
    """Its thread must not hold what its waiters hold: their frames, which hold the engine."""
    model = ScriptedModel([5, 6, 7], max_length=8192, step_s=0.001)
    engine = InferenceEngine(model, None, max_batch_size=1, max_queue_size=1, batch_timeout_ms=0)
    fill(engine, model)
    loop = asyncio.new_event_loop()

    tasks = [loop.create_task(produce(engine, number, [])) for number in range(3)]
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    model.release()
    reference = weakref.ref(engine)
    del engine, loop, tasks
    for _ in range(1000):
        gc.collect()
        if reference() is None:
            return
        threading.Event().wait(0.01)
    raise AssertionError("the engine is still alive")
