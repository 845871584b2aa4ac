"""The running sequences: best first, and the class that each of them defends."""

from __future__ import annotations

import math

from penstock.sampling import RequestPriority
from penstock.scheduling.live import RunningSet
from penstock.scheduling.policy import AgingPolicy
from tests.unit.scheduling.test_queue import sequence

LOW, NORMAL, HIGH, CRITICAL = RequestPriority


def running_set(*keys: tuple[int, RequestPriority, int]) -> RunningSet:
    """Sequences of (number, class, how often they were preempted)."""
    running = RunningSet()
    for number, priority, num_preemptions in keys:
        seq = sequence(number, priority, deadline=-50.0)
        running.add(seq, AgingPolicy(5.0).running_key(seq, num_preemptions))
    return running


def test_best_comes_first_and_the_worst_without_a_row_is_the_first_victim() -> None:
    running = running_set((1, LOW, 0), (2, HIGH, 0), (3, NORMAL, 0), (4, NORMAL, 0))
    assert [seq.id for seq in running] == [2, 3, 4, 1]
    next(iter(running)).in_flight = 1
    assert [seq.id for seq in running.unplanned()] == [1, 4, 3]
    running.remove(3)
    assert ([seq.id for seq in running], len(running), 3 in running, 4 in running) == ([2, 4, 1], 3, False, True)


def test_a_victim_defends_a_higher_class_than_its_own() -> None:
    running = running_set((1, LOW, 2), (2, HIGH, 0), (3, CRITICAL, 0))
    assert [running.rank(seq) for seq in running] == [CRITICAL, HIGH, LOW + 2]
    assert running.lowest_rank() == min(HIGH, LOW + 2)
    running.remove(1)
    assert running.lowest_rank() == HIGH


def test_where_nobody_runs_nobody_can_be_outranked() -> None:
    assert RunningSet().lowest_rank() == math.inf
