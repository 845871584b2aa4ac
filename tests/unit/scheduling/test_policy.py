"""Keys by hand."""

from __future__ import annotations

import math
from typing import Any

from penstock.sampling import RequestPriority, SamplingParams
from penstock.scheduling.policy import AgingPolicy
from penstock.sequence import Sequence

LOW, NORMAL, HIGH, CRITICAL = RequestPriority
policy = AgingPolicy(5.0)


def sequence(number: int, priority: RequestPriority = NORMAL, **fields: Any) -> Sequence:
    params = SamplingParams()
    return Sequence(id=number, request_id="", params=params, tokens=[1], max_len=9, priority=priority, **fields)


def order(now: float, *sequences: Sequence) -> list[int]:
    return [seq.id for seq in sorted(sequences, key=lambda seq: policy.waiting_key(seq, now))]


def test_class_then_deadline_then_arrival_then_id() -> None:
    assert order(
        4.0,
        sequence(1, LOW),
        sequence(2, NORMAL, arrival=1.0),
        sequence(3, NORMAL, arrival=0.5),
        sequence(5, NORMAL, arrival=2.0, deadline=9.0),
        sequence(4, NORMAL, arrival=0.5),
        sequence(6, CRITICAL, arrival=4.0),
    ) == [6, 5, 3, 4, 2, 1]


def test_waiting_moves_one_class_up_per_boost() -> None:
    old, new = sequence(1, LOW, arrival=0.0), sequence(2, HIGH, arrival=9.9)
    assert order(9.99, old, new) == [2, 1]
    assert order(10.0, old, new) == [1, 2], "same tier, and it came first"
    assert order(15.0, old, new) == [1, 2]


def test_whoever_waits_long_enough_beats_every_newcomer() -> None:
    assert order(20.0, sequence(1, LOW, arrival=0.0), sequence(2, CRITICAL, arrival=20.0, deadline=20.5)) == [1, 2]


def test_keys_say_when_they_change() -> None:
    seq = sequence(1, arrival=2.0)
    assert [policy.next_change(seq, now) for now in (2.0, 6.9, 7.0)] == [7.0, 7.0, 12.0]


def test_next_change_is_always_later_than_now() -> None:
    thirds = AgingPolicy(1 / 3)
    seq, now = sequence(1, arrival=0.1), 0.1
    for _ in range(1000):
        assert thirds.next_change(seq, now) > now
        now = thirds.next_change(seq, now)
    assert 333 < now < 334


def test_running_keep_their_order_and_victims_move_up() -> None:
    seq = sequence(3, LOW, arrival=1.0)
    assert policy.rank(seq) == 1
    assert policy.running_key(seq, 0) == (-1, math.inf, 1.0, 3)
    assert policy.running_key(seq, 2) == (-3, math.inf, 1.0, 3)
