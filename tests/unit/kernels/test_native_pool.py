"""Pools of threads: any number of them, used from any thread, gone when closed."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from penstock.kernels.native import Kernels, available
from penstock.kernels.products import Linear

TASKS = "/proc/self/task"

pytestmark = pytest.mark.skipif(not available(), reason="no compiler")


def product(kernels: Kernels, rows: int = 40) -> torch.Tensor:
    """A product that is large enough to have a piece for every thread."""
    weight = torch.arange(64 * 500).reshape(500, 64).remainder(17).float()
    x = torch.arange(rows * 64).reshape(rows, 64).remainder(5).float()
    return Linear(kernels, [weight], [None])(x)


def test_pools_of_any_size_give_the_same() -> None:
    pools = [Kernels(count) for count in (1, 2, 3, 5, 8)]
    results = [product(pool) for pool in pools]
    assert all(torch.equal(result, results[0]) for result in results)
    for pool in pools:
        pool.close()


def test_a_pool_made_on_one_thread_works_on_another() -> None:
    kernels, found = Kernels(2), []
    thread = threading.Thread(target=lambda: found.append(product(kernels)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], product(kernels))
    kernels.close()


def test_pools_of_several_threads_run_beside_each_other() -> None:
    found: list[torch.Tensor] = []

    def run() -> None:
        kernels = Kernels(2)
        found.extend(product(kernels) for _ in range(5))
        kernels.close()

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = Kernels(1)
    wanted = product(alone)
    assert len(found) == 15
    assert all(torch.equal(result, wanted) for result in found)
    alone.close()


def test_calls_may_follow_each_other_without_a_pause() -> None:
    kernels, weight, x = Kernels(2), torch.ones(64, 64), torch.ones(1, 64)
    linear = Linear(kernels, [weight], [None])
    for _ in range(100_000):
        linear(x)
    assert torch.equal(linear(x), torch.full((1, 64), 64.0))
    kernels.close()


def test_threads_that_cores_are_missing_for_sit_out_and_results_stay_the_same() -> None:
    kernels, alone = Kernels(16 * (os.cpu_count() or 1)), Kernels(1)
    wanted, end = product(alone), time.monotonic() + 60
    while kernels.active == kernels.threads:
        assert time.monotonic() < end
        assert torch.equal(product(kernels), wanted)
    assert torch.equal(product(kernels), wanted)
    kernels.close()
    alone.close()


def test_threads_that_sat_out_are_tried_again() -> None:
    kernels, end = Kernels(16 * (os.cpu_count() or 1)), time.monotonic() + 60
    least = kernels.threads
    while kernels.active <= least:
        assert time.monotonic() < end
        least = kernels.active
        product(kernels)
    assert least < kernels.threads
    kernels.close()


@pytest.mark.skipif(not os.path.exists(TASKS), reason="the system does not list threads")
def test_closed_pools_leave_no_threads_behind() -> None:
    before = len(os.listdir(TASKS))
    for _ in range(60):
        kernels = Kernels(4)
        product(kernels, rows=1)
        kernels.close()
    # a thread that ended may be listed for a moment longer
    assert len(os.listdir(TASKS)) < before + 30


def test_closing_twice_does_nothing() -> None:
    kernels, other = Kernels(2), Kernels(2)
    expected = product(other)
    kernels.close()
    kernels.close()
    assert not kernels.pool
    assert torch.equal(product(other), expected), "memory that was freed twice would be somebody else's"
    other.close()
