"""Who goes before whom, who gives way, and that nobody waits for ever."""

from __future__ import annotations

import random
from typing import Any

import pytest

from penstock.cache.manager import CacheManager
from penstock.config import EngineConfig
from penstock.sampling import RequestPriority, SamplingParams
from penstock.scheduling.policy import AgingPolicy
from penstock.scheduling.scheduler import Scheduler
from penstock.sequence import Sequence, Status
from penstock.step import RowResult, StepResult
from tests.unit.scheduling.world import CRITICAL, HIGH, LOW, NORMAL, World


def test_priority_decides_who_starts() -> None:
    world = World(max_batch_size=1)
    for number, priority in ((1, LOW), (2, NORMAL), (3, CRITICAL), (4, NORMAL)):
        world.add(number, 3, new=1, priority=priority)
    assert world.drain() == [[3], [2], [4], [1]]


def test_the_earliest_deadline_goes_first_within_a_class() -> None:
    world = World(max_batch_size=1)
    for number, deadline in ((1, 50.0), (2, 40.0), (3, float("inf")), (4, 30.0)):
        world.add(number, 3, new=1, deadline=deadline)
    assert world.drain() == [[4], [2], [1], [3]]


def test_a_higher_class_takes_the_place_of_the_worst_lower_one() -> None:
    world = World(max_batch_size=2)
    world.add(1, 3, new=9, priority=LOW)
    world.add(2, 3, new=9, priority=NORMAL)
    world.step()
    world.add(3, 3, new=9, priority=HIGH)
    assert list(world.step()) == [3, 2]
    world.add(4, 3, new=9, priority=HIGH)
    assert list(world.step()) == [3, 4]


def test_a_higher_class_takes_blocks_of_lower_ones() -> None:
    world = World()
    world.add(1, 12, new=9, priority=LOW)
    world.add(2, 16, new=9, priority=LOW)
    world.step()
    world.add(3, 16, new=9, priority=HIGH)
    assert world.begin() == {3: (0, 16), 1: (12, 13)}


def test_nobody_is_displaced_in_vain() -> None:
    world = World()
    world.add(1, 20, new=9, priority=HIGH)
    world.add(2, 4, new=9, priority=LOW)
    world.step()
    world.add(3, 24, new=9, priority=HIGH)
    assert list(world.step()) == [1, 2]
    assert world.scheduler.stats()["num_preemptions"] == 0


def test_within_a_class_nobody_is_displaced_for_a_start() -> None:
    world = World(max_batch_size=1)
    world.add(1, 3, new=2)
    world.step()
    world.add(2, 3, new=1, deadline=1.5)
    assert world.drain() == [[1], [2]]


def test_every_high_arrival_starts_at_once_though_aged_ones_wait() -> None:
    world = World(max_batch_size=2)
    for number in (1, 2, 3):
        world.add(number, 3, new=30, priority=LOW)
    world.step(now=1.0)
    for number in (4, 5):
        world.add(number, 3, new=2, now=100.0, priority=CRITICAL)
    assert list(world.step(now=100.0)) == [4, 5]
    assert list(world.step(now=100.0)) == [4, 5]
    assert list(world.step(now=100.0)) == [1, 2]


def test_free_room_belongs_to_the_head_of_the_queue() -> None:
    """A higher class may take what a lower one has, not what somebody has waited for longer."""
    world = World(max_batch_size=2)
    world.add(1, 3, new=3, priority=LOW)
    world.add(2, 3, new=1, priority=LOW)
    world.add(3, 3, new=9, priority=LOW)
    world.step(now=1.0)
    world.add(4, 3, new=9, now=100.0, priority=CRITICAL)
    assert list(world.step(now=100.0)) == [3, 4], "3 fills the free place, 4 displaces 1"


def test_a_victim_is_displaced_only_so_often() -> None:
    world = World(max_batch_size=1)
    low = world.add(1, 3, new=30, priority=LOW)
    for number in range(2, 12):
        world.step()
        world.add(number, 3, new=1, now=1.0, priority=CRITICAL)
        world.step()
    assert world.scheduler.stats()["num_preemptions"] == CRITICAL - LOW
    assert low.status is Status.RUNNING


def test_waiting_raises_a_request_above_a_higher_class() -> None:
    world = World(max_batch_size=1, priority_boost_threshold=5.0)
    world.add(1, 3, new=9, priority=CRITICAL)
    world.step()
    world.add(2, 3, new=1, now=1.0, priority=LOW)
    world.add(3, 3, new=1, now=10.9, priority=HIGH)
    while world.scheduler.get(1):
        world.step(now=12.0)
    assert list(world.step(now=12.0)) == [2]


def test_the_boost_follows_the_configuration() -> None:
    world = World(max_batch_size=1)
    world.add(1, 3, new=1, now=0.0, priority=LOW)
    world.add(2, 3, new=1, now=4.0, priority=NORMAL)
    world.config.priority_boost_threshold = 1.0
    assert list(world.step(now=4.0)) == [1]


def test_a_policy_is_a_key_function_of_the_callers() -> None:
    class ShortestFirst(AgingPolicy):
        def waiting_key(self, seq: Sequence, now: float) -> tuple[int, float, float, int]:
            return (seq.prompt_len, 0.0, seq.arrival, seq.id)

    world = World(max_batch_size=1)
    world.scheduler = Scheduler(world.config, CacheManager(10, 4), ShortestFirst(5.0))
    world.cache = CacheManager(10, 4)
    for number, length in ((1, 9), (2, 3), (3, 5)):
        world.add(number, length, new=1)
    starts = []
    while world.scheduler.has_work:
        world.plan = world.scheduler.plan(0.0)
        starts += [row.seq_id for row in world.plan.rows]
        world.end()
    assert starts == [2, 3, 1]


class Siege:
    """Critical requests fill a queue of limited length at every 10 ms step; low ones come now and then."""

    def __init__(self, batch: int, caching: bool) -> None:
        config = EngineConfig(max_batch_size=batch, max_num_batched_tokens=16, priority_boost_threshold=0.2)
        self.scheduler = Scheduler(config, CacheManager(4 * batch, 4, enable_prefix_caching=caching))
        self.rng, self.now, self.batch = random.Random(0), 0.0, batch
        self.born: dict[int, float] = {}
        self.started: dict[int, float] = {}
        self.ended: dict[int, float] = {}
        self.low: list[int] = []

    def add(self, priority: RequestPriority) -> None:
        prompt = [self.rng.randrange(3) for _ in range(self.rng.randint(1, 9))]
        fields: dict[str, Any] = {
            "request_id": "",
            "params": SamplingParams(),
            "arrival": self.now,
            "priority": priority,
        }
        seq = Sequence(id=len(self.born), tokens=prompt, max_len=14, **fields)
        self.born[seq.id] = self.now
        self.scheduler.add(seq, self.now)
        if priority is RequestPriority.LOW:
            self.low.append(seq.id)

    def step(self) -> None:
        plan = self.scheduler.plan(self.now)
        self.started |= {seq.id: self.now for seq in self.scheduler.take_started()}
        rows = tuple(RowResult((1,) if row.samples else ()) for row in plan.rows)
        events = self.scheduler.commit(plan, StepResult(rows))
        self.ended |= {event.seq_id: self.now for event in events if event.reason}
        self.now += 0.01


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("caching", [True, False])
def test_low_priority_starts_and_ends_in_bounded_time_under_saturating_high_load(batch: int, caching: bool) -> None:
    siege = Siege(batch, caching)
    for tick in range(1500):
        while siege.scheduler.num_waiting < 20 * batch:
            siege.add(RequestPriority.CRITICAL)
        if tick % 100 == 0:
            siege.add(RequestPriority.LOW)
        siege.step()
    early = [number for number in siege.low if siege.born[number] < 10.0]
    assert max(siege.started[number] - siege.born[number] for number in early) < 2.5
    assert max(siege.ended[number] - siege.born[number] for number in early) < 4.0


def test_an_equal_is_not_displaced_even_if_it_has_no_row_in_the_step() -> None:
    """A limit lowered in mid-prefill leaves it without a token; the newcomer needs its blocks."""
    world = World(caching=False, max_num_batched_tokens=8)
    world.add(1, 3, new=9, priority=LOW)
    world.step()
    runs = world.add(2, 24, priority=HIGH)
    world.step()
    assert (len(runs.blocks), world.cache.num_free_blocks) == (6, 3)
    world.config.max_num_batched_tokens = 1
    world.add(3, 20, priority=HIGH)
    assert world.begin() == {1: (4, 5)}
    assert runs.status is Status.RUNNING
