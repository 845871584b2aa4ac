"""The gate of the weight sync: who waits, who is let in, and that nobody is forgotten, whatever happens in between."""

from __future__ import annotations

import asyncio
import contextvars
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from penstock import EngineStateError, WeightsError
from penstock.backends.services.weight_gate import WeightGate
from tests.http_sockets import wait_until

TURNS = 12  # of the event loop, more than any hand-over of the gate takes


async def settle() -> None:
    """Let every task run until it waits. No other thread takes part, so a number of turns suffices."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


async def test_requests_run_together_and_an_update_runs_alone() -> None:
    gate, order = WeightGate(), list[str]()
    async with gate.arequest() as first:
        other = asyncio.create_task(held(gate, may_end := asyncio.Event()), context=contextvars.Context())
        await settle()
        update = asyncio.create_task(updated(gate, order))
        await settle()
        late = asyncio.create_task(requested(gate, order), context=contextvars.Context())
        await settle()
        assert (first, order, gate.num_running, gate.is_open) == (0, [], 2, False)
    may_end.set()
    await asyncio.gather(other, update, late)
    assert order == ["update 1", "request 1"]


async def updated(gate: WeightGate, order: list[str]) -> None:
    async with gate.aupdate() as version:
        assert gate.num_running == 0
        order.append(f"update {version}")


async def requested(gate: WeightGate, order: list[str]) -> None:
    async with gate.arequest() as version:
        order.append(f"request {version}")


async def test_a_failed_update_releases_all_who_wait_with_its_error_until_one_succeeds() -> None:
    """A service stayed in the state "syncing" for ever, and its clients ran into their time limits."""
    gate, order = WeightGate(), list[str]()
    may_fail = asyncio.Event()
    failing = asyncio.create_task(failed(gate, may_fail))
    await settle()
    waiting = [asyncio.create_task(requested(gate, order)) for _ in range(3)]
    await settle()
    may_fail.set()
    with pytest.raises(OSError, match="disk"):
        await failing
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(error, WeightsError) and "disk is full" in str(error) for error in errors)
    assert len({id(error) for error in errors}) == 3
    with pytest.raises(WeightsError, match="disk is full"), gate.request():
        pass
    await updated(gate, order)
    await requested(gate, order)
    assert order == ["update 1", "request 1"]


async def failed(gate: WeightGate, may_fail: asyncio.Event) -> None:
    async with gate.aupdate():
        await may_fail.wait()
        raise OSError("disk is full")


async def test_a_failed_update_releases_those_who_wait_even_if_another_update_waits_too() -> None:
    gate, order, may_fail = WeightGate(), list[str](), asyncio.Event()
    tasks = [asyncio.create_task(work) for work in (failed(gate, may_fail), updated(gate, order))]
    await settle()
    waiting = asyncio.create_task(requested(gate, order))
    await settle()
    may_fail.set()
    await asyncio.gather(*tasks, waiting, return_exceptions=True)
    assert isinstance(waiting.exception(), WeightsError)
    assert order == ["update 1"]
    assert gate.is_open


async def test_resume_serves_the_old_weights_after_a_failed_update() -> None:
    gate, order = WeightGate(), list[str]()
    with pytest.raises(OSError, match="disk"), gate.update():
        raise OSError("disk")
    with pytest.raises(WeightsError):
        gate.check()
    gate.resume()
    gate.check()
    await requested(gate, order)
    assert order == ["request 0"]


async def test_a_cancelled_update_lets_the_requests_in_that_it_held_back() -> None:
    gate, order = WeightGate(), list[str]()
    async with gate.arequest():
        update = asyncio.create_task(updated(gate, order))
        await settle()
        waiting = asyncio.create_task(requested(gate, order), context=contextvars.Context())
        await settle()
        assert not waiting.done()
        update.cancel()
        await settle()
        assert waiting.done()
    assert order == ["request 0"]


async def test_updates_run_one_after_the_other_and_each_makes_a_version() -> None:
    gate, order = WeightGate(), list[str]()
    await asyncio.gather(*(updated(gate, order) for _ in range(3)))
    assert order == ["update 1", "update 2", "update 3"]
    assert gate.version == 3


async def test_an_update_makes_the_version_that_the_trainer_has_announced_when_it_begins() -> None:
    """The version was read again after the update, so a version announced meanwhile was named but not served."""
    gate = WeightGate()
    for _ in range(2):
        gate.add_trained()
    async with gate.aupdate() as version:
        gate.add_trained()
        assert version == 2
    assert (gate.version, gate.num_trained) == (2, 3)


@pytest.mark.parametrize(("staleness", "num_free"), [(0, 0), (2, 2), (float("inf"), 50)])
async def test_requests_wait_when_complete_batches_exceed_the_staleness(staleness: float, num_free: int) -> None:
    gate, order = WeightGate(staleness), list[str]()
    for _ in range(num_free):
        gate.add_batch()
    assert gate.is_open
    gate.add_batch()
    waiting = asyncio.create_task(requested(gate, order))
    await settle()
    assert waiting.done() == (staleness == float("inf"))
    await updated(gate, order)
    await waiting
    assert gate.is_open


async def test_further_updates_for_one_batch_do_not_loosen_the_bound() -> None:
    gate, order = WeightGate(0), list[str]()
    gate.add_batch()
    for _ in range(3):
        await updated(gate, order)
    assert gate.is_open
    gate.add_batch()
    assert not gate.is_open


async def test_a_request_inside_of_another_belongs_to_it_so_an_update_in_between_blocks_nothing() -> None:
    """An episode of several calls may hold one lease around all of them."""
    gate, order = WeightGate(), list[str]()
    async with gate.arequest():
        update = asyncio.create_task(updated(gate, order))
        await settle()
        await requested(gate, order)
        await asyncio.to_thread(blocking_request, gate, order)
        child = asyncio.create_task(held(gate, may_end := asyncio.Event()))
        await settle()
        assert gate.num_running == 1
    await settle()
    assert order == ["request 0", "request 0"]  # the child still runs with these weights
    may_end.set()
    assert await child == 0
    await update
    assert (order[-1], gate.num_running) == ("update 1", 0)


async def test_a_task_that_outlives_the_request_that_started_it_makes_requests_of_its_own() -> None:
    gate, order, may_begin = WeightGate(), list[str](), asyncio.Event()

    async def late() -> None:
        await may_begin.wait()
        await requested(gate, order)

    async with gate.arequest():
        task = asyncio.create_task(late())
    async with gate.aupdate():
        may_begin.set()
        await settle()
        assert order == []
    await task
    assert order == ["request 1"]


def blocking_request(gate: WeightGate, order: list[str]) -> None:
    with gate.request() as version:
        order.append(f"request {version}")


async def held(gate: WeightGate, may_end: asyncio.Event) -> int:
    async with gate.arequest() as version:
        await may_end.wait()
        return version


async def test_an_update_inside_of_a_request_is_refused_because_it_would_wait_for_itself() -> None:
    gate = WeightGate()
    async with gate.arequest():
        with pytest.raises(EngineStateError, match="would never begin"):
            await updated(gate, [])
    await updated(gate, [])


def test_threads_wait_for_an_update_as_event_loops_do() -> None:
    gate, versions, has_begun, may_end = WeightGate(), list[int](), threading.Event(), threading.Event()

    def update() -> None:
        with gate.update():
            has_begun.set()
            assert may_end.wait(60)

    def request() -> None:
        with gate.request() as version:
            versions.append(version)

    with ThreadPoolExecutor(9) as pool:
        futures = [pool.submit(update)]
        assert has_begun.wait(60)
        futures += [pool.submit(request) for _ in range(8)]
        may_end.set()
        for future in futures:
            future.result(60)
    assert versions == [1] * 8


# One seed is one interleaving. The schedule is virtual: tasks run when the test says so, and nothing sleeps.


@dataclass
class World:
    """A gate, what happens at it, and what must hold."""

    random: random.Random
    gate: WeightGate
    steps: list[tuple[str, asyncio.Future[None]]] = field(default_factory=list)  # of tasks inside the gate
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    waiting: set[asyncio.Task[None]] = field(default_factory=set)
    num_updating: int = 0
    num_inside: int = 0
    num_ends: dict[str, int] = field(default_factory=dict)

    async def request(self) -> None:
        """A request of a few steps, which must see one version."""
        async with self.gate.arequest() as version:
            self.waiting.discard(current())
            self.num_inside += 1
            try:
                for _ in range(self.random.randrange(4)):
                    async with self.gate.arequest() as inner:
                        assert inner == version
                    await self.step("request")
                    assert self.num_updating == 0
                    assert self.gate.version == version
            finally:
                self.num_inside -= 1

    async def update(self) -> None:
        """An update of a few steps, which may fail."""
        async with self.gate.aupdate() as target:
            self.waiting.discard(current())
            assert self.num_inside == 0
            self.num_updating += 1
            try:
                assert self.num_updating == 1
                for _ in range(self.random.randrange(3)):
                    await self.step("update")
                    assert self.num_inside == 0
                if self.random.random() < 0.3:
                    raise OSError("no space left")
                assert self.gate.version < target
            finally:
                self.num_updating -= 1

    async def step(self, kind: str) -> None:
        """Wait for the schedule."""
        future = asyncio.get_running_loop().create_future()
        self.steps.append((kind, future))
        await future

    def start(self, work: Any) -> None:
        async def counted() -> None:
            try:
                await work()
                end = "success"
            except (WeightsError, OSError) as error:
                end = type(error).__name__
            self.num_ends[end] = self.num_ends.get(end, 0) + 1

        task = asyncio.create_task(counted(), name=work.__name__)
        self.tasks.append(task)
        self.waiting.add(task)
        task.add_done_callback(self.waiting.discard)

    def advance(self) -> None:
        """Let one task inside the gate go on."""
        self.steps = [entry for entry in self.steps if not entry[1].done()]
        if self.steps:
            self.steps[self.random.randrange(len(self.steps))][1].set_result(None)

    def cancel(self) -> None:
        if running := [task for task in self.tasks if not task.done()]:
            self.random.choice(running).cancel()

    def check(self) -> None:
        """Whoever could be let in is inside: no wake-up was lost."""
        assert self.num_updating <= 1
        assert not (self.num_updating and self.num_inside)
        assert self.gate.num_running == self.num_inside
        if self.gate.is_open:
            assert not self.waiting
        if not (self.num_updating or self.num_inside):
            assert not [task for task in self.waiting if task.get_name() == "update"]


def current() -> asyncio.Task[None]:
    task = asyncio.current_task()
    assert task is not None
    return task


@pytest.mark.parametrize("staleness", [0.0, 2.0, float("inf")])
async def test_no_interleaving_loses_a_wake_up_mixes_versions_or_leaves_a_waiter_behind(staleness: float) -> None:
    """400 seeds for each mode: requests, updates, failures, cancellations, batches and resumes in a random order."""
    ends: dict[str, int] = {}
    for seed in range(400):
        world = World(random.Random(seed), WeightGate(staleness))
        actions: list[Callable[[], object]] = [
            *[lambda world=world: world.start(world.request)] * 4,
            *[lambda world=world: world.start(world.update)] * 2,
            *[world.advance] * 5,
            *(world.cancel, world.gate.add_batch, world.gate.add_trained, world.gate.resume),
        ]
        for _ in range(world.random.randrange(10, 60)):
            world.random.choice(actions)()
            turns = world.random.choice((0, 1, TURNS))  # several actions may fall into one turn of the loop
            for _ in range(turns):
                await asyncio.sleep(0)
            if turns == TURNS:
                world.check()
        await finish(world)
        for end, count in world.num_ends.items():
            ends[end] = ends.get(end, 0) + count
    assert min(ends[end] for end in ("success", "WeightsError", "OSError")) > 100


async def finish(world: World) -> None:
    """Run everything to its end. What still waits then can only wait for weights, which the last updates bring."""
    await settle()
    world.check()
    while any(not future.done() for _, future in world.steps):
        world.advance()
        await settle()
        world.check()
    world.gate.resume()
    while not world.gate.is_open:
        async with world.gate.aupdate():
            pass
    while not all(task.done() for task in world.tasks):
        world.advance()
        await settle()
    world.check()
    assert world.gate.num_running == 0
    for task in world.tasks:
        if not task.cancelled():
            task.result()


def test_threads_that_come_and_go_at_random_see_one_version_each() -> None:
    """The same on real threads, whose interleaving is up to the machine."""
    gate, mixed = WeightGate(), list[int]()
    weights = [0]

    def rollouts(seed: int) -> None:
        for _ in range(200):
            try:
                with gate.request() as version:
                    if not weights[0] == version == gate.version:
                        mixed.append(version)
            except WeightsError:
                gate.resume()

    def trainer(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(100):
            try:
                with gate.update() as version:
                    if chance.random() < 0.2:
                        raise OSError("no space left")
                    weights[0] = version
            except OSError:
                pass

    work = [*[rollouts] * 6, *[trainer] * 2]
    threads = [threading.Thread(target=function, args=(seed,), daemon=True) for seed, function in enumerate(work)]
    for thread in threads:
        thread.start()
    wait_until(lambda: not any(thread.is_alive() for thread in threads), 100)
    assert mixed == []
    assert gate.num_running == 0
