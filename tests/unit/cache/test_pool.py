"""The block pool's order and counts, on ids by hand."""

from __future__ import annotations

import pytest

from penstock.cache.pool import BlockPool


def test_blocks_are_taken_in_order_and_come_back_on_top() -> None:
    pool = BlockPool(4)
    assert [pool.take() for _ in range(3)] == [0, 1, 2]
    for block in (2, 1, 0):
        pool.free(block)
    assert list(pool.free_blocks()) == [0, 1, 2, 3]
    assert pool.num_free == pool.num_empty == 4


def test_cached_blocks_are_taken_last_and_oldest_first() -> None:
    pool = BlockPool(4)
    for block in [pool.take(), pool.take(), pool.take()]:
        pool.keep(block)
    for block in (2, 0, 1):
        pool.free(block)
    assert list(pool.free_blocks()) == [3, 2, 0, 1]
    assert (pool.num_empty, pool.num_cached_free, pool.oldest()) == (1, 3, 2)


def test_sharing_a_free_cached_block_takes_it_off_the_list() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.keep(block)
    pool.free(block)
    pool.share(block)
    pool.share(block)
    assert (pool.refs(block), pool.num_free) == (2, 1)
    pool.free(block)
    assert list(pool.free_blocks()) == [1]
    pool.free(block)
    assert list(pool.free_blocks()) == [1, 0]


def test_forgotten_block_counts_as_empty() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.keep(block)
    assert not pool.is_private(block)
    pool.free(block)
    pool.forget(block)
    assert (pool.num_empty, pool.num_cached_free, pool.take()) == (2, 0, block)
    assert pool.is_private(block)


def test_misuse_is_caught() -> None:
    pool = BlockPool(1)
    block = pool.take()
    with pytest.raises(AssertionError):
        pool.take()
    with pytest.raises(AssertionError):
        pool.oldest()
    pool.free(block)
    with pytest.raises(AssertionError):
        pool.free(block)
