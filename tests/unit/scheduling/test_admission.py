"""The door's counts and its advice, on a clock by hand."""

from __future__ import annotations

import threading

import pytest

from penstock.config import EngineConfig
from penstock.errors import EngineOverloaded
from penstock.scheduling.admission import Admission


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_full_queue_refuses_and_counts_nothing() -> None:
    admission = Admission(EngineConfig(max_queue_size=2), Clock())
    admission.reserve(2, 10)
    with pytest.raises(EngineOverloaded, match="Request queue is full: 2 of 2 requests"):
        admission.reserve(1, 10)
    assert (admission.num_requests, admission.num_tokens) == (2, 10)
    admission.release(1, 5)
    admission.reserve(1, 5)


def test_tokens_are_limited_except_for_the_only_one_that_waits() -> None:
    admission = Admission(EngineConfig(max_queued_tokens=100), Clock())
    admission.reserve(1, 1000)
    with pytest.raises(EngineOverloaded, match="1000 of 100 tokens"):
        admission.reserve(1, 1)
    admission.adjust(-950)
    admission.reserve(1, 50)
    with pytest.raises(EngineOverloaded):
        admission.reserve(1, 1)


def test_limits_may_change_while_it_runs() -> None:
    config = EngineConfig(max_queue_size=1)
    admission = Admission(config, Clock())
    admission.reserve(1, 1)
    with pytest.raises(EngineOverloaded):
        admission.reserve(1, 1)
    config.max_queue_size = 2
    admission.reserve(1, 1)
    assert admission.num_requests == 2


def advice(admission: Admission, num_requests: int, num_tokens: int) -> float:
    with pytest.raises(EngineOverloaded) as caught:
        admission.reserve(num_requests, num_tokens)
    return caught.value.retry_after_s


def test_advice_follows_the_observed_rate_and_a_stall_counts() -> None:
    clock = Clock()
    admission = Admission(EngineConfig(max_queue_size=10, max_queued_tokens=100), clock)
    admission.reserve(10, 50)
    assert advice(admission, 1, 0) == 1.0, "nothing is known yet"
    for _ in range(4):
        admission.release(1, 10)
        clock.now += 2.0
    admission.reserve(4, 50)
    assert advice(admission, 3, 0) == pytest.approx(3 * 8.0 / 4)
    assert advice(admission, 0, 70) == pytest.approx(30 * 8.0 / 40)
    clock.now += 8.0
    assert advice(admission, 3, 0) == pytest.approx(3 * 16.0 / 4)
    clock.now += 10_000.0
    assert advice(admission, 3, 0) == 60.0


def test_releasing_more_than_reserved_is_a_bug() -> None:
    admission = Admission(EngineConfig())
    with pytest.raises(AssertionError):
        admission.release(1, 0)


def test_counts_survive_many_threads() -> None:
    admission = Admission(EngineConfig(max_queue_size=10**6))

    def come_and_go() -> None:
        for _ in range(500):
            admission.reserve(2, 3)
            admission.adjust(1)
            admission.release(1, 2)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (admission.num_requests, admission.num_tokens) == (2000, 4000)
