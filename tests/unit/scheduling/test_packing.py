"""Which of the waiting start together: each strategy by hand, in the scheduler that uses it."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.config import EngineConfig
from penstock.errors import RequestTooLarge
from penstock.sampling import RequestPriority
from penstock.scheduling.limits import Limits
from penstock.scheduling.packing import MIB, Naive, bucket_around, engine_packing, paged_mb
from penstock.scheduling.policy import AgingPolicy
from penstock.scheduling.queue import WaitingQueue
from penstock.scheduling.scheduler import Scheduler
from penstock.sequence import Sequence
from tests.unit.scheduling.test_searches import offers, search
from tests.unit.scheduling.world import CRITICAL, HIGH, NORMAL, World


class Packed(World):
    """A world whose packing is the one that its settings ask for; a token of cache is a MiB."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.config.block_size = 4
        limits = Limits(self.config)
        packing = engine_packing(self.config, limits, self.cache.capacity, MIB, 0)
        self.scheduler = Scheduler(self.config, self.cache, limits=limits, packing=packing)


def test_continuous_is_the_default_and_starts_whoever_is_next() -> None:
    world = Packed(max_batch_size=2)
    for number, new in ((1, 1), (2, 3), (3, 1)):
        world.add(number, 3, new=new)
    assert world.drain() == [[1, 2], [2, 3], [2]]


# Static batches.


def test_nobody_joins_a_static_batch() -> None:
    world = Packed(batching_strategy="naive", max_batch_size=2)
    for number, new in ((1, 1), (2, 3), (3, 1), (4, 1)):
        world.add(number, 3, new=new)
    assert world.drain() == [[1, 2], [2], [2], [3, 4]]


def test_a_static_batch_is_the_best_of_those_who_wait_when_it_forms() -> None:
    world = Packed(batching_strategy="naive", max_batch_size=2)
    world.add(1, 3, new=2)
    world.step()
    world.add(2, 3, new=1, priority=NORMAL)
    world.add(3, 3, new=1, priority=HIGH)
    world.add(4, 3, new=1, priority=CRITICAL)
    assert world.drain() == [[1], [4, 3], [2]]


def test_even_a_higher_class_waits_for_a_static_batch() -> None:
    world = Packed(batching_strategy="naive", max_batch_size=1)
    world.add(1, 3, new=3)
    world.step()
    world.add(2, 3, new=1, priority=CRITICAL)
    assert world.drain() == [[1], [1], [2]]
    assert world.scheduler.stats()["num_preemptions"] == 0


def test_a_static_batch_may_start_over_several_steps() -> None:
    world = Packed(batching_strategy="naive", max_batch_size=3, max_num_batched_tokens=4)
    for number in (1, 2, 3):
        world.add(number, 4, new=2)
    world.begin()
    world.end()
    world.add(4, 1, new=1)
    assert {seq_id for step in world.drain() for seq_id in step} == {1, 2, 3, 4}
    assert world.plan.rows[0].seq_id == 4


def test_a_victim_comes_back_to_its_static_batch() -> None:
    world = Packed(num_blocks=4, batching_strategy="naive", max_batch_size=2, caching=False)
    world.add(1, 4, new=8)
    world.add(2, 4, new=8)
    world.step()
    world.add(3, 1, new=1)
    steps = world.drain()
    assert world.scheduler.stats()["num_preemptions"] > 0
    assert steps[-1] == [3]
    assert all(3 not in step for step in steps[:-1])


def test_samples_of_a_request_join_its_static_batch() -> None:
    world = Packed(batching_strategy="naive", max_batch_size=4)
    first = world.add(1, [1, 2, 3], new=3)
    world.add(2, [1, 2, 3], new=3, request_id="1", parent=first, sample_index=1)
    assert list(world.step()) == [1]
    world.add(3, 3, new=1, priority=CRITICAL)
    assert world.drain() == [[1, 2], [1, 2], [3]]


def test_beams_that_wait_for_each_other_keep_their_static_batch() -> None:
    world = Packed(batching_strategy="naive", max_batch_size=1)
    search(world, 3, new=3)
    world.begin()
    world.end({1: offers(t50=-1.0, t51=-2.0)})
    world.begin()
    world.end({1: offers(t60=-1.0)})
    world.add(9, 3, new=1, priority=CRITICAL)
    assert world.scheduler.num_running == 0
    assert list(world.begin()) == [2]


def test_a_member_that_a_higher_class_started_is_waited_for() -> None:
    """Only `starts` knew whom it had started itself; of the others it thought they had not begun."""
    waiting: WaitingQueue[Sequence] = WaitingQueue(AgingPolicy(5.0))
    world = World()
    one, two, three = (world.add(number, 3) for number in (1, 2, 3))
    packing = Naive(lambda: 2)
    waiting.push(one, 0.0)
    waiting.push(two, 0.0)
    assert next(packing.select(waiting, [], lambda seq: True)) is one
    waiting.remove(one.id)
    waiting.remove(two.id)  # by the scheduler, because its class is higher than that of one which runs
    assert list(packing.select(waiting, [one, two], lambda seq: True)) == []
    waiting.push(two, 0.0)
    waiting.push(three, 0.0)
    assert list(packing.select(waiting, [], lambda seq: True)) == [two]


def test_without_continuous_batching_batches_are_static() -> None:
    world = Packed(batching_strategy="bucketed", enable_continuous_batching=False, max_batch_size=2)
    for number, new in ((1, 1), (2, 2), (3, 1)):
        world.add(number, 3, new=new)
    assert world.drain() == [[1, 2], [2], [3]]


def test_without_dynamic_batching_the_strategy_is_ignored() -> None:
    world = Packed(batching_strategy="bucketed", enable_dynamic_batching=False, bucket_size=0)
    world.add(1, 3, new=1)
    world.add(2, 9, new=1)
    assert world.drain() == [[1, 2]]


# Buckets.


def test_sequences_of_similar_length_start_together() -> None:
    world = Packed(batching_strategy="bucketed", bucket_size=2)
    for number, length in ((1, 3), (2, 9), (3, 5), (4, 10), (5, 4)):
        world.add(number, length, new=1)
    assert world.drain() == [[1, 3, 5], [2, 4]]


def test_a_bucket_is_where_most_wait_around_the_first_in_line() -> None:
    assert bucket_around(10, [10, 7, 12, 13, 14], 4) == (10, 14)
    assert bucket_around(10, [10, 6, 7, 8, 14], 4) == (6, 10)
    assert bucket_around(10, [], 4) == (10, 14)
    assert bucket_around(10, [9, 11], 0) == (10, 10)


def test_a_higher_class_goes_before_any_bucket() -> None:
    world = Packed(batching_strategy="bucketed", bucket_size=2)
    world.add(1, 3, new=1)
    world.add(2, 3, new=1)
    world.add(3, 9, new=1, priority=HIGH)
    assert world.drain() == [[3], [1, 2]]


def test_an_earlier_deadline_is_not_passed_by_a_bucket() -> None:
    world = Packed(batching_strategy="bucketed", bucket_size=2, max_batch_size=2)
    for number, length, deadline in ((1, 3, 50.0), (2, 9, 60.0), (3, 3, 70.0)):
        world.add(number, length, new=1, deadline=deadline)
    assert world.drain() == [[1], [2], [3]]


def test_deadlines_of_their_own_do_not_keep_similar_lengths_apart() -> None:
    """Every request that has a deadline has one of its own: only one was started in each step."""
    world = Packed(num_blocks=100, batching_strategy="bucketed", bucket_size=2)
    for number, length in enumerate((5, 4, 6, 3, 6), 1):
        world.add(number, length, new=1, deadline=50.0 + number)
    assert world.drain() == [[1, 2, 3], [4], [5]], "the fourth is not similar to the third, and nobody passes it"


def test_waiting_carries_a_lone_length_past_a_full_bucket() -> None:
    """Newcomers of the favoured length keep coming; after one boost they are of a lower tier than the odd one."""
    world = Packed(batching_strategy="bucketed", bucket_size=2, max_batch_size=1, priority_boost_threshold=2.0)
    world.add(1, 4, new=1, now=0.0)
    world.add(2, 12, new=1, now=0.1)
    started = []
    for number in range(3, 12):
        now = number / 2
        world.add(number, 4, new=1, now=now)
        started += list(world.step(now=now))
    assert 2 in started


# Memory.


def test_memory_aware_starts_only_what_fits_to_its_end() -> None:
    """10 blocks: 1 and 2 grow to 5 blocks each, so the third waits although 7 blocks are free at first."""
    world = Packed(batching_strategy="memory_aware")
    for number in (1, 2, 3):
        world.add(number, 4, new=16)
    assert list(world.step()) == [1, 2]
    world.drain()
    assert world.scheduler.stats()["num_preemptions"] == 0


def test_continuous_pays_for_the_same_with_preemptions() -> None:
    world = Packed()
    for number in (1, 2, 3):
        world.add(number, 4, new=16)
    assert list(world.step()) == [1, 2, 3]
    world.drain()
    assert world.scheduler.stats()["num_preemptions"] > 0


def test_the_first_in_line_goes_first_and_behind_it_the_least_memory() -> None:
    world = Packed(batching_strategy="memory_aware", max_batch_size=1)
    for number, new in ((1, 9), (2, 8), (3, 1), (4, 4)):
        world.add(number, 4, new=new)
    order = list(dict.fromkeys(seq_id for step in world.drain() for seq_id in step))
    assert order == [1, 2, 3, 4], "one place: each in turn is the first in line"
    world = Packed(batching_strategy="memory_aware", max_num_batched_tokens=8, max_batch_size=2)
    for number, new in ((1, 9), (2, 8), (3, 1), (4, 4)):
        world.add(number, 4, new=new)
    assert list(world.step()) == [1, 3]


def test_what_fits_passes_the_first_in_line_until_that_has_waited() -> None:
    world = Packed(batching_strategy="memory_aware", priority_boost_threshold=2.0)
    world.add(1, 4, new=20, now=0.0)  # 6 of 10 blocks, until it is done
    world.step(now=0.0)
    world.add(2, 20, new=4, now=0.1)  # 6 blocks: has to wait
    world.add(3, 4, new=1, now=0.2)
    assert list(world.step(now=0.3)) == [1, 3]
    world.add(4, 4, new=1, now=2.2)
    assert list(world.step(now=2.3)) == [1], "one tier up, nobody passes it"


def test_what_never_fits_is_refused_when_it_arrives() -> None:
    world = Packed(batching_strategy="memory_aware", memory_limit_mb=16)
    with pytest.raises(RequestTooLarge, match=r"needs 20\.0 MiB, and the limit is 16\.0"):
        world.add(1, 4, new=13)
    assert not world.scheduler.has_work
    world.add(2, 4, new=12)
    world.drain()


def test_memory_aware_counts_a_search_with_all_its_beams() -> None:
    """32 MiB hold the 24 that two beams come to, and not 12 more; beams were counted when each of them started."""
    world = Packed(batching_strategy="memory_aware", memory_limit_mb=32)
    search(world, 3, new=9)
    world.add(9, 3, new=9)
    assert list(world.begin()) == [1]
    world.end({1: offers(t50=-1.0, t51=-2.0)})
    assert list(world.begin()) == [1, 2]


def test_memory_aware_runs_a_search_alone_whose_beams_exceed_the_limit() -> None:
    world = Packed(batching_strategy="memory_aware", memory_limit_mb=20)
    world.add(9, 3, new=2)
    world.step()
    search(world, 3, new=9)
    assert list(world.step()) == [9]
    assert list(world.begin()) == [1]
    world.end({1: offers(t50=-1.0, t51=-2.0)})
    assert list(world.begin()) == [1, 2]


def test_a_memory_limit_beyond_the_cache_is_the_cache() -> None:
    world = Packed(batching_strategy="memory_aware", memory_limit_mb=8192)
    for number in (1, 2, 3):
        world.add(number, 4, new=16)
    assert list(world.step()) == [1, 2]
    world.drain()
    assert world.scheduler.stats()["num_preemptions"] == 0


def test_weights_share_the_memory_limit() -> None:
    packing = engine_packing(
        EngineConfig(batching_strategy="memory_aware", memory_limit_mb=100, block_size=4),
        Limits(EngineConfig()),
        1000,
        MIB,
        60 * MIB,
    )
    seq = World().add(1, 36, new=4)
    packing.check(seq)
    assert packing.permits(seq, [])
    assert not packing.permits(seq, [seq])
    assert packing.permits(seq, [seq], leaving=[seq])
    assert paged_mb(4, MIB, 60 * MIB)([5, 1]) == 60 + 8 + 4


@pytest.mark.parametrize("strategy", ["naive", "bucketed", "memory_aware", "continuous"])
def test_every_strategy_serves_everybody_to_the_end(strategy: str) -> None:
    world = Packed(batching_strategy=strategy, bucket_size=3, max_batch_size=3, max_num_batched_tokens=12)
    lengths = {number: 1 + number * 7 % 12 for number in range(1, 16)}
    for number, length in lengths.items():
        world.add(number, length, new=3, priority=list(RequestPriority)[number % 4])
    assert {seq_id for step in world.drain() for seq_id in step} == set(lengths)
    assert world.scheduler.stats()["num_finished_length"] == len(lengths)
