"""`RoomQueue`: which waiting coroutine is woken, in which order, and that none sleeps while there is room."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from penstock.config import EngineConfig
from penstock.engine.loop.host import Host
from penstock.engine.requests.room import RoomQueue
from penstock.errors import EngineClosed
from penstock.sampling import RequestPriority
from penstock.scheduling.admission import Admission, QueuePlace

LOW, NORMAL, HIGH, _ = RequestPriority
PATIENCE_S = 60.0


async def never_boots(worker: object) -> Any:
    raise AssertionError


class Setup:
    """An admission with its room queue, and the names of those that were admitted after a wait, in order."""

    def __init__(self, **settings: int) -> None:
        self.config = EngineConfig(**settings)
        self.admission = Admission(self.config)
        self.host = Host(never_boots)
        self.room = RoomQueue(self.admission, self.host)
        self.places: list[QueuePlace] = []
        self.order: list[str] = []
        self.numbers = itertools.count()

    def submit(self, num_tokens: int = 1, priority: int = NORMAL) -> QueuePlace:
        """Submit a request without waiting for room."""
        self.places.append(QueuePlace(str(next(self.numbers)), num_tokens, priority))
        for loser in self.admission.reserve(self.places[-1:]):
            self.places.remove(loser)
        return self.places[-1]

    def start_oldest(self, count: int = 1) -> None:
        """Let the oldest requests start, which frees their places."""
        for _ in range(count):
            self.admission.release(self.places.pop(0))

    async def wait_and_submit(self, name: str, num_tokens: int = 1, priority: int = NORMAL) -> None:
        """Wait for room, then submit without an await in between."""
        await self.room.wait(num_tokens, priority)
        self.submit(num_tokens, priority)
        self.order.append(name)

    def tasks(self, *names: str, **arguments: int) -> list[asyncio.Task[None]]:
        """Tasks that wait and submit, created in this order."""
        return [asyncio.create_task(self.wait_and_submit(name, **arguments)) for name in names]


async def turns(count: int = 6) -> None:
    """Let whatever is ready on this loop run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_with_room_there_is_no_wait() -> None:
    setup = Setup(max_queue_size=2)
    coroutine = setup.wait_and_submit("a")
    with pytest.raises(StopIteration):
        coroutine.send(None)
    assert setup.order == ["a"]
    assert setup.admission.on_release is None  # nothing is called for requests while nobody waits


async def test_one_freed_place_wakes_the_longest_waiting_alone() -> None:
    setup = Setup(max_queue_size=2)
    setup.submit(), setup.submit()
    tasks = setup.tasks("a", "b", "c")
    await turns()
    assert setup.order == []
    setup.start_oldest()
    await turns()
    assert setup.order == ["a"]
    setup.start_oldest(2)
    await turns()
    assert setup.order == ["a", "b", "c"]
    assert all(task.done() for task in tasks)


async def test_a_newcomer_does_not_overtake_a_woken_one() -> None:
    setup = Setup(max_queue_size=1)
    setup.submit()
    waiting, *_ = setup.tasks("waiting")
    await turns()
    setup.start_oldest()
    newcomer = setup.wait_and_submit("newcomer")
    assert newcomer.send(None) is not None  # it waits, although a place is free
    await waiting
    assert setup.order == ["waiting"]
    newcomer.close()


async def test_a_waiter_that_leaves_room_behind_wakes_the_next() -> None:
    """A woken coroutine that submits nothing must not leave the others waiting for a release that never comes."""
    setup = Setup(max_queue_size=1)
    setup.submit()
    idle = asyncio.create_task(setup.room.wait(1, NORMAL))
    tasks = setup.tasks("next")
    await turns()
    setup.start_oldest()
    await asyncio.wait_for(asyncio.gather(idle, *tasks), PATIENCE_S)
    assert setup.order == ["next"]


@pytest.mark.parametrize("is_woken", [False, True])
async def test_a_cancelled_wait_passes_its_turn_on_and_leaves_nothing_behind(is_woken: bool) -> None:
    setup = Setup(max_queue_size=1)
    setup.submit()
    cancelled, after = setup.tasks("cancelled", "after")
    await turns()
    frame = weakref.ref(cancelled)
    if is_woken:
        setup.start_oldest()
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert cancelled.cancelled()
    del cancelled
    gc.collect()
    assert frame() is None
    if not is_woken:
        setup.start_oldest()
    await asyncio.wait_for(after, PATIENCE_S)
    assert setup.order == ["after"]


async def test_higher_classes_go_first_and_a_displacing_one_does_not_wait() -> None:
    setup = Setup(max_queue_size=2)
    setup.submit(priority=HIGH), setup.submit(priority=HIGH)
    tasks = [*setup.tasks("low", priority=LOW), *setup.tasks("high", "high 2", priority=HIGH)]
    await turns()
    setup.start_oldest(2)
    await turns()
    assert setup.order == ["high", "high 2"]
    setup.start_oldest(2)
    await turns()
    assert setup.order[2:] == ["low"]
    setup.submit(priority=LOW)
    await asyncio.wait_for(setup.wait_and_submit("displacing", priority=HIGH), PATIENCE_S)
    assert all(task.done() for task in tasks)


async def test_a_long_prompt_is_not_overtaken_by_short_ones() -> None:
    setup = Setup(max_queued_tokens=100)
    setup.submit(60), setup.submit(30)
    (long,) = setup.tasks("long", num_tokens=50)
    (short,) = setup.tasks("short", num_tokens=20)
    await turns()
    setup.submit(10)
    setup.start_oldest()
    await turns()
    assert setup.order == ["long"]
    setup.start_oldest()
    await asyncio.gather(long, short)


async def test_a_prompt_that_turns_out_shorter_makes_room() -> None:
    setup = Setup(max_queued_tokens=100)
    place = setup.submit(80)
    (task,) = setup.tasks("a", num_tokens=50)
    await turns()
    setup.admission.adjust(place, 90)
    await turns()
    assert not task.done()
    setup.admission.adjust(place, 40)
    await asyncio.wait_for(task, PATIENCE_S)


async def test_a_raised_limit_takes_effect_with_the_next_waiter() -> None:
    setup = Setup(max_queue_size=1)
    setup.submit()
    tasks = setup.tasks("a")
    await turns()
    setup.config.max_queue_size = 3
    await asyncio.wait_for(asyncio.gather(*tasks, *setup.tasks("b")), PATIENCE_S)
    assert setup.order == ["a", "b"]


async def test_stopping_wakes_all_with_engine_closed() -> None:
    setup = Setup(max_queue_size=1)
    setup.submit()
    tasks = setup.tasks("a", "b", "c")
    await turns()
    setup.host.stop(0.0)
    endings = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE_S)
    assert [type(ending) for ending in endings] == [EngineClosed] * 3
    with pytest.raises(EngineClosed):
        await setup.room.wait(1, NORMAL)


async def test_a_waiting_task_that_nobody_holds_is_not_collected() -> None:
    """Weak references to the waiters themselves would have lost it."""
    setup = Setup(max_queue_size=1)
    setup.submit()
    setup.tasks("a")
    await turns()
    gc.collect()
    setup.start_oldest()
    await turns()
    assert setup.order == ["a"]


def abandoned_loop(setup: Setup, close: bool) -> tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]:
    """A loop that ended while one coroutine waits on it."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(setup.wait_and_submit("abandoned"))
    loop.run_until_complete(turns())
    if close:
        loop.close()
    return loop, task


def test_a_closed_loop_is_passed_over() -> None:
    setup = Setup(max_queue_size=1)
    setup.submit()
    loop, task = abandoned_loop(setup, close=True)

    async def main() -> None:
        (after,) = setup.tasks("after")
        await turns()
        setup.start_oldest()
        await asyncio.wait_for(after, PATIENCE_S)

    asyncio.run(main())
    assert setup.order == ["after"]
    assert loop.is_closed()
    task.get_coro().close()  # type: ignore[union-attr]


def test_a_waiter_on_a_stopped_loop_does_not_block_a_newcomer() -> None:
    setup = Setup(max_queue_size=1)
    setup.submit()
    loop, task = abandoned_loop(setup, close=False)
    setup.start_oldest()
    asyncio.run(asyncio.wait_for(setup.wait_and_submit("newcomer"), PATIENCE_S))
    assert setup.order == ["newcomer"]
    setup.start_oldest()
    loop.run_until_complete(task)
    assert setup.order == ["newcomer", "abandoned"]
    loop.close()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_it_works_under_both_kinds_of_event_loop(backend: str) -> None:
    setup = Setup(max_queue_size=1)
    setup.submit()

    async def main() -> None:
        with anyio.move_on_after(0) as scope:
            await setup.wait_and_submit("cancelled")
        assert scope.cancelled_caught
        async with anyio.create_task_group() as group:
            for name in ("a", "b"):
                group.start_soon(setup.wait_and_submit, name)
                await anyio.wait_all_tasks_blocked()
            for _ in range(2):
                await anyio.to_thread.run_sync(setup.start_oldest)
                await anyio.wait_all_tasks_blocked()

    anyio.run(main, backend=backend)
    assert setup.order == ["a", "b"]


def run_in_threads(*mains: Callable[[], Awaitable[None]]) -> None:
    """One event loop per thread."""
    threads = [threading.Thread(target=anyio.run, args=(main,), daemon=True) for main in mains]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"


def test_waiters_on_many_loops_are_all_admitted() -> None:
    setup, admitted = Setup(max_queue_size=3), threading.Semaphore(0)
    pending: list[QueuePlace] = []

    async def producer() -> None:
        for _ in range(50):
            while True:
                await setup.room.wait(1, NORMAL)
                place = QueuePlace("", 1)
                try:
                    setup.admission.reserve([place])
                except RuntimeError:  # another loop was faster
                    continue
                pending.append(place)
                admitted.release()
                break

    async def many() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(producer)

    async def consumer() -> None:
        for _ in range(4 * 10 * 50):
            await anyio.to_thread.run_sync(admitted.acquire)
            setup.admission.release(pending.pop(0))

    run_in_threads(many, many, many, many, consumer)
    assert setup.admission.num_requests == 0


def test_a_queue_with_waiters_is_collected_while_its_admission_lives() -> None:
    """The engine's thread holds the admission: a coroutine that waits must not keep the engine alive through it."""
    setup = Setup(max_queue_size=1)
    setup.submit()
    admission, host, room = setup.admission, setup.host, weakref.ref(setup.room)
    loop, task = abandoned_loop(setup, close=True)
    del setup, task, loop
    gc.collect()
    assert room() is None
    assert admission.on_release is None
    host.on_close()
