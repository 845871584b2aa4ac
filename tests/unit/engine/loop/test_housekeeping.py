"""When memory is released, which memory, and that it waits for the running step: a cache of 8 blocks of 4 tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from penstock.cache.manager import CacheManager
from penstock.config import EngineConfig
from penstock.engine.loop.housekeeping import TIDY_PAUSE_S, Housekeeper
from penstock.engine.loop.worker import Job
from penstock.models.scripted import ScriptedModel
from tests.unit.cache.hand import run, sequence


class FullModel(ScriptedModel):
    """Uses 90 % of the memory; records what it is told to release."""

    def __init__(self) -> None:
        super().__init__([5])
        self.trimmed: list[tuple[list[int], list[int]]] = []

    def memory_usage(self) -> float:
        """Above the default of gc_threshold."""
        return 0.9

    def trim_memory(self, blocks: Sequence[int] = (), places: Sequence[int] = ()) -> int:
        """A hundred bytes for each block."""
        self.trimmed.append((sorted(blocks), sorted(places)))
        return 100 * (len(blocks) + len(places))


class House:
    """A housekeeper. `now` is its clock; while the model's thread is `busy`, its work waits in `jobs`."""

    jobs: list[Callable[[], None]]

    def __init__(self, **settings: Any) -> None:
        self.model, self.cache, self.now, self.busy = FullModel(), CacheManager(8, 4), 0.0, False
        self.jobs = []
        self.keeper = Housekeeper(EngineConfig(**settings), self.model, self.cache, lambda: self.now, self.run)

    def run(self, function: Callable[..., int], *arguments: Any) -> Job[int]:
        """Queue a job on the model's thread."""
        loop = asyncio.get_running_loop()
        job: Job[int] = Job(loop.create_future(), loop.create_future())
        self.jobs.append(lambda: job.done.set_result(function(*arguments)))
        if not self.busy:
            self.work()
        return job

    def work(self) -> None:
        """Run the queued jobs of the model's thread."""
        for job in self.jobs:
            job()
        self.jobs.clear()


def house_with_a_prefix() -> House:
    """Blocks 0 to 2 are cached, one has a last token, and no sequence runs."""
    house, seq = House(), sequence([*range(13)])
    run(house.cache, seq)
    house.cache.release(seq)
    return house


async def test_an_idle_engine_above_the_threshold_gives_back_what_holds_nothing() -> None:
    house = house_with_a_prefix()
    await house.keeper.tidy()
    assert house.model.trimmed == [([3, 4, 5, 6, 7], [])]
    assert house.cache.lookup(sequence([*range(13)])) == 12, "what can be found is still of use"


async def test_tidying_is_seldom_and_not_below_the_threshold() -> None:
    """B4-11: an earlier engine emptied the allocator's cache after every batch."""
    house = House()
    for house.now in (0.0, 1.0, TIDY_PAUSE_S - 1, TIDY_PAUSE_S, TIDY_PAUSE_S + 1):
        await house.keeper.tidy()
    assert len(house.model.trimmed) == 2
    roomy = House(gc_threshold=0.95)
    await roomy.keeper.tidy()
    assert roomy.model.trimmed == []


async def test_cleaning_drops_cached_prefixes_and_tells_the_bytes() -> None:
    house, done = house_with_a_prefix(), Future[int]()
    house.keeper.clean(done)
    assert house.model.trimmed == [([*range(8)], [])]
    assert done.result() == 800
    assert house.cache.lookup(sequence([*range(13)])) == 0


async def test_a_draft_model_gives_back_too() -> None:
    house, done = House(), Future[int]()
    Housekeeper(EngineConfig(), house.model, house.cache, lambda: 0.0, house.run, lambda: 7).clean(done)
    assert done.result() == 807


async def test_cleaning_leaves_running_sequences_their_blocks() -> None:
    house, done, seq = house_with_a_prefix(), Future[int](), sequence([*range(13)])
    run(house.cache, seq)
    house.keeper.clean(done)
    assert house.model.trimmed == [([4, 5, 6, 7], [])]
    house.cache.check([seq])


async def test_cleaning_waits_for_the_step_that_runs() -> None:
    house, done = House(), Future[int]()
    house.busy = True
    house.keeper.clean(done)
    assert not done.done()
    assert house.model.trimmed == []
    house.work()
    assert done.result() == 800


async def test_an_error_of_cleaning_reaches_its_caller() -> None:
    house, done = House(), Future[int]()
    house.model.trim_memory = lambda *_: 1 // 0  # type: ignore[method-assign,assignment]
    house.keeper.clean(done)
    with pytest.raises(ZeroDivisionError):
        done.result()


async def test_an_engine_that_has_ended_frees_nothing() -> None:
    house, done = House(), Future[int]()

    def refuse(*_: Any) -> Job[int]:
        raise RuntimeError("the worker was shut down")

    Housekeeper(EngineConfig(), house.model, house.cache, lambda: 0.0, refuse).clean(done)
    assert done.result() == 0
