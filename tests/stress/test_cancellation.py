"""A thousand requests, cancelled at random awaits by every means there is, while others run to their ends.

Afterwards nothing may be left of them, anywhere, and the others' tokens must be exact.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from queue import SimpleQueue

import pytest

from penstock.api.channel import Channel, RequestStatus
from penstock.api.event_loop import new_event_loop
from penstock.api.handle import RequestHandle
from penstock.api.transcript import Transcript
from penstock.engine.inference import InferenceEngine
from penstock.engine.requests.collector import Collector
from penstock.engine.requests.request import Request
from penstock.errors import RequestAborted
from penstock.models.scripted import ScriptedModel
from penstock.sampling import SamplingParams
from penstock.sequence import Sequence as EngineSequence

VOCAB = 1000
ENDLESS = 5000  # tokens that no victim lives to see, though its thread may have to wait for its turn
OURS = (Channel, Transcript, Request, RequestHandle, Collector, EngineSequence)


def next_token(tokens: Sequence[int], index: int) -> int:
    """Depends on all that a mix-up could change: whose prompt, how far, which completion."""
    return (tokens[0] * 31 + tokens[-1] * 7 + len(tokens) * 3 + index) % VOCAB


def expected(prompt: list[int], index: int, count: int) -> list[int]:
    """What the model emits for one completion alone."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, index))
    return tokens[len(prompt) :]


class Boom(Exception):
    """Fails a task group."""


class Crowd:
    """Submits requests to one engine and cancels them, each in its own way."""

    def __init__(self, engine: InferenceEngine, seed: int) -> None:
        self.engine = engine
        self.rng = random.Random(seed)
        self.used: Counter[str] = Counter()
        self.gate = asyncio.Semaphore(150)
        self.foreign: SimpleQueue[str | None] = SimpleQueue()
        self.thread = threading.Thread(target=self.abort_elsewhere)
        self.means: list[Callable[[], Awaitable[None]]] = [
            self.by_task_cancel,
            self.by_aclose,
            self.by_breaking_out,
            self.by_timeout,
            self.by_wait_for,
            self.by_dropping,
            self.by_dropping_into_a_cycle,
            self.by_task_group_failure,
            self.by_handle_cancel,
            self.by_abort_from_a_thread,
            self.by_leaving_the_context,
        ]

    def prompt(self) -> list[int]:
        return [self.rng.randrange(VOCAB) for _ in range(self.rng.choice((1, 2, 3, 7, 16, 17, 40)))]

    def endless(self) -> RequestHandle:
        return self.engine.generate(self.prompt(), SamplingParams(n=self.rng.randint(1, 3), max_tokens=ENDLESS))

    async def a_while(self) -> None:
        """A random number of turns of the loop, sometimes none."""
        for _ in range(self.rng.choice((0, 0, 1, 2, 5, 20))):
            await asyncio.sleep(0)

    async def read(self, handle: RequestHandle, most: int = 6) -> None:
        """Take a random number of deltas, sometimes none."""
        for _ in range(self.rng.randint(0, most)):
            await anext(handle)

    async def consume(self, handle: RequestHandle) -> None:
        if self.rng.random() < 0.5:
            await handle
        else:
            async for _ in handle:
                await asyncio.sleep(0)

    async def victim(self) -> None:
        """One request that does not live to its end."""
        async with self.gate:
            means = self.rng.choice(self.means)
            self.used[means.__name__] += 1
            await means()

    async def survivor(self) -> None:
        """One request that does."""
        async with self.gate:
            prompt, n, count = self.prompt(), self.rng.randint(1, 3), self.rng.randint(1, 40)
            handle = self.engine.generate(prompt, SamplingParams(n=n, max_tokens=count))
            found: list[list[int]] = [[] for _ in range(n)]
            if self.rng.random() < 0.5:
                found = [out.token_ids for out in (await handle).outputs]
            else:
                async for delta in handle:
                    found[delta.index] += delta.token_ids
            assert found == [expected(prompt, index, count) for index in range(n)]
            assert handle.status is RequestStatus.COMPLETED

    async def by_task_cancel(self) -> None:
        task = asyncio.create_task(self.consume(self.endless()))
        await self.a_while()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()

    async def by_aclose(self) -> None:
        handle = self.endless()
        await self.read(handle)
        await handle.aclose()

    async def by_breaking_out(self) -> None:
        left = self.rng.randint(1, 6)
        async for _ in self.endless():
            left -= 1
            if not left:
                break

    async def by_timeout(self) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(self.rng.random() * 0.01):
                await self.consume(self.endless())

    async def by_wait_for(self) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(self.endless(), self.rng.random() * 0.01)

    async def by_dropping(self) -> None:
        handle = self.endless()
        await self.read(handle)
        del handle

    async def by_dropping_into_a_cycle(self) -> None:
        cycle: list[object] = [self.endless()]
        cycle.append(cycle)

    async def by_task_group_failure(self) -> None:
        async def fail() -> None:
            await self.a_while()
            raise Boom

        async def both() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.consume(self.endless()))
                group.create_task(fail())

        with pytest.raises(ExceptionGroup):
            await both()

    async def by_handle_cancel(self) -> None:
        handle = self.endless()
        await self.read(handle)
        handle.cancel()
        with pytest.raises(RequestAborted):
            await handle
        assert handle.status is RequestStatus.CANCELLED

    async def by_abort_from_a_thread(self) -> None:
        handle = self.endless()
        await self.read(handle)
        self.foreign.put(handle.request_id)
        with pytest.raises(RequestAborted):
            await self.consume(handle)

    async def by_leaving_the_context(self) -> None:
        async with self.endless() as handle:
            await self.read(handle)

    def abort_elsewhere(self) -> None:
        while (request_id := self.foreign.get()) is not None:
            self.engine.abort(request_id)

    async def run(self, num_victims: int, num_survivors: int) -> None:
        """Everybody at once, in random order."""
        everybody = [self.victim] * num_victims + [self.survivor] * num_survivors
        self.rng.shuffle(everybody)
        self.thread.start()
        try:
            async with asyncio.TaskGroup() as group:
                for one in everybody:
                    group.create_task(one())
        finally:
            self.foreign.put(None)
            self.thread.join()


def num_ours() -> Counter[str]:
    """How many of the engine's per-request objects exist."""
    gc.collect()
    return Counter(type(one).__name__ for one in gc.get_objects() if type(one) in OURS)


async def settled(engine: InferenceEngine) -> dict[str, int]:
    """The queue's figures once the engine has nothing left to do, or after a minute."""
    for _ in range(12_000):
        queue: dict[str, int] = engine.get_stats()["queue"]
        if not any(queue[name] for name in ("num_requests", "num_running", "num_waiting")):
            break
        await asyncio.sleep(0.005)
    return queue


async def storm(num_victims: int, num_survivors: int, seed: int) -> None:
    """Cancel them all, then look for anything that is left."""
    before = num_ours()
    model = ScriptedModel(next_token, vocab_size=VOCAB, step_s=0.0005)
    settings = {"kv_cache_tokens": 16384, "max_sequence_length": None, "max_batch_size": 48, "max_queue_size": 2000}
    async with InferenceEngine(model, **settings) as engine:  # type: ignore[arg-type]
        crowd = Crowd(engine, seed)
        await crowd.run(num_victims, num_survivors)
        gc.collect()
        steps = model.plans
        queue = await settled(engine)
        assert model.plans - steps <= 2
        assert {queue[name] for name in ("num_requests", "num_waiting", "num_running")} == {0}
        assert (queue["num_queued_requests"], queue["num_queued_tokens"]) == (0, 0)
        cache = engine.get_stats()["cache_info"]
        assert cache["num_free_blocks"] == cache["num_blocks"]
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert sorted(crowd.used) == sorted(means.__name__ for means in crowd.means)
        assert await left_of(before, but="Sequence") == {}  # whose entries the scheduler's heaps drop lazily
    del engine, crowd
    assert await left_of(before) == {}


async def left_of(before: Counter[str], but: str = "") -> dict[str, int]:
    """What there is more of than before, once there is nothing, or after a minute.

    The engine's thread may still be in the function that ended a request, and another in the one that stopped it.
    """
    for _ in range(6000):
        left = {name: count for name, count in (num_ours() - before).items() if name != but}
        if not left:
            break
        await asyncio.sleep(0.01)
    return left


async def test_nothing_is_left_of_a_thousand_cancelled_requests() -> None:
    await storm(1000, 150, seed=1)


def test_nothing_is_left_on_the_faster_event_loop_either() -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(storm(200, 50, seed=2))
