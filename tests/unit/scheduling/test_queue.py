"""The waiting queue against sorting by key."""

from __future__ import annotations

import random
import weakref
from typing import Any

import pytest

from penstock.sampling import RequestPriority, SamplingParams
from penstock.scheduling.policy import AgingPolicy
from penstock.scheduling.queue import WaitingQueue
from penstock.sequence import Sequence

LOW, NORMAL, HIGH, CRITICAL = RequestPriority


def sequence(number: int, priority: RequestPriority = NORMAL, **fields: Any) -> Sequence:
    params = SamplingParams()
    return Sequence(id=number, request_id="", params=params, tokens=[1], max_len=9, priority=priority, **fields)


def test_best_comes_first() -> None:
    queue = WaitingQueue(AgingPolicy(5.0))
    for seq in (sequence(1, LOW), sequence(2), sequence(3, HIGH), sequence(4)):
        queue.push(seq, 0.0)
    assert len(queue) == 4
    assert [queue.pop().id for _ in range(4)] == [3, 2, 4, 1]
    assert queue.peek() is None
    with pytest.raises(AssertionError):
        queue.pop()


def test_removed_ones_are_gone() -> None:
    queue = WaitingQueue(AgingPolicy(5.0))
    for number in (1, 2):
        queue.push(sequence(number), 0.0)
    assert queue.remove(1)
    assert not queue.remove(1)
    assert (1 in queue, 2 in queue, [seq.id for seq in queue]) == (False, True, [2])
    best = queue.peek()
    assert best is not None
    assert best.id == 2


def test_advance_refreshes_the_keys_that_changed() -> None:
    queue = WaitingQueue(AgingPolicy(5.0))
    queue.push(sequence(1, LOW, arrival=0.0), 0.0)
    queue.push(sequence(2, NORMAL, arrival=4.0), 4.0)
    for now, best in ((4.9, 2), (5.0, 1), (9.0, 2), (10.0, 1)):
        queue.advance(now)
        seq = queue.peek()
        assert seq is not None
        assert (now, seq.id) == (now, best)


def test_classes_can_be_asked_separately() -> None:
    queue = WaitingQueue(AgingPolicy(5.0))
    assert queue.top_rank() < LOW
    queue.push(sequence(1, LOW, arrival=-100.0), 0.0)
    queue.push(sequence(2, HIGH), 0.0)
    best, best_above = queue.peek(), queue.peek(above=LOW)
    assert best is not None
    assert best_above is not None
    assert (best.id, best_above.id, queue.top_rank()) == (1, 2, HIGH)
    assert queue.peek(above=HIGH) is None


def test_another_policy_orders_anew() -> None:
    queue = WaitingQueue(AgingPolicy(5.0))
    queue.push(sequence(1, LOW, arrival=0.0), 0.0)
    queue.push(sequence(2, NORMAL, arrival=4.0), 4.0)
    queue.change_policy(AgingPolicy(1.0), 4.0)
    assert queue.pop().id == 1


@pytest.mark.parametrize("seed", range(5))
def test_order_is_that_of_sorting_by_key_at_every_time(seed: int) -> None:
    rng, policy = random.Random(seed), AgingPolicy(1.5)
    queue, waiting, now = WaitingQueue(policy), dict[int, Sequence](), 0.0
    for number in range(400):
        now += rng.random()
        queue.advance(now)
        seq = sequence(
            number, rng.choice(list(RequestPriority)), arrival=now, deadline=rng.choice([1e9, now + rng.random()])
        )
        waiting[number] = seq
        queue.push(seq, now)
        expected = min(waiting.values(), key=lambda seq: policy.waiting_key(seq, now))
        assert queue.peek() is expected
        if rng.random() < 0.7:
            gone = rng.choice(list(waiting)) if rng.random() < 0.5 else expected.id
            del waiting[gone]
            assert queue.remove(gone)
    assert {seq.id for seq in queue} == waiting.keys()


def test_an_idle_queue_keeps_no_ended_sequence_alive() -> None:
    class Watched(Sequence):
        """Can be watched, unlike its base."""

    queue = WaitingQueue[Sequence](AgingPolicy(5.0))
    seq = Watched(id=1, request_id="", params=SamplingParams(), tokens=[1], max_len=9)
    left = weakref.ref(seq)
    queue.push(seq, 0.0)
    queue.push(seq, 6.0)
    queue.remove(1)
    del seq
    assert left() is None
