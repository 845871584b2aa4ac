"""A handle can be used like any coroutine: tasks, task groups, timeouts, on asyncio and on trio."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
import pytest
import trio

from penstock import InferenceEngine, RequestAborted, RequestHandle, RequestOutput, SamplingParams, ScriptedModel

FEW = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
MANY = SamplingParams(temperature=0.0, max_tokens=1_000_000, ignore_eos=True)
Spelling = Callable[[RequestHandle], Awaitable[RequestOutput]]


@pytest.fixture
async def engine() -> AsyncIterator[InferenceEngine]:
    async with InferenceEngine(ScriptedModel([7], step_s=0.001), max_sequence_length=None) as served:
        yield served


async def in_a_task(handle: RequestHandle) -> RequestOutput:
    return await asyncio.create_task(handle)


async def in_a_group(handle: RequestHandle) -> RequestOutput:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(handle, name="generate")
    return task.result()


async def in_a_wait(handle: RequestHandle) -> RequestOutput:
    (task,), _ = await asyncio.wait([asyncio.ensure_future(handle)])
    return task.result()


async def within_a_time(handle: RequestHandle) -> RequestOutput:
    return await asyncio.wait_for(handle, 60)


async def shielded(handle: RequestHandle) -> RequestOutput:
    return await asyncio.shield(handle)


async def as_completed(handle: RequestHandle) -> RequestOutput:
    (first,) = asyncio.as_completed([handle])
    return await first


@pytest.mark.parametrize("spelling", [in_a_task, in_a_group, in_a_wait, within_a_time, shielded, as_completed])
async def test_every_spelling_awaits_the_result(engine: InferenceEngine, spelling: Spelling) -> None:
    """`create_task` raised "a coroutine was expected"."""
    assert (await spelling(engine.generate([1], FEW))).generated_ids == [7, 7, 7]


async def test_a_cancelled_task_aborts_its_request(engine: InferenceEngine) -> None:
    for delay_s in (0.0, 0.02):  # before the task has started, and while it waits
        handle = engine.generate([1], MANY)
        task = asyncio.create_task(handle)
        if delay_s:
            await asyncio.sleep(delay_s)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        with pytest.raises(RequestAborted):
            await handle


async def test_two_tasks_share_a_handle(engine: InferenceEngine) -> None:
    handle = engine.generate([1], FEW)
    first, second = asyncio.create_task(handle), asyncio.create_task(handle)
    assert await first == await second == await handle == await asyncio.create_task(handle)


async def test_the_handle_of_a_task_is_not_dropped_while_the_task_runs(engine: InferenceEngine) -> None:
    task = asyncio.create_task(engine.generate([1], FEW))
    gc.collect()
    assert len((await task).generated_ids) == 3
    assert "RequestHandle" in repr(task)


async def test_closing_a_handle_as_a_coroutine_aborts_it(engine: InferenceEngine) -> None:
    handle = engine.generate([1], MANY)
    handle.close()
    with pytest.raises(RequestAborted):
        await handle


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_task_groups_of_anyio_start_a_request(backend: str) -> None:
    async def main() -> None:
        async with InferenceEngine(ScriptedModel([7])) as served:
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(served.generate, [1], FEW)
            assert served.get_stats()["totals"]["requests"] == 3

    anyio.run(main, backend=backend)


def test_a_nursery_of_trio_starts_a_request() -> None:
    async def main() -> None:
        async with InferenceEngine(ScriptedModel([7])) as served:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(served.generate, [1], FEW)
            assert served.get_stats()["totals"]["requests"] == 1

    trio.run(main)
