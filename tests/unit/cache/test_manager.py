"""Block tables by hand: 10 blocks of 4 tokens, exact block ids."""

from __future__ import annotations

import pytest

from penstock.cache.manager import CacheManager
from tests.unit.cache.hand import compute, run, sequence, start


def test_tokens_become_blocks() -> None:
    cache = CacheManager(10, 4)
    seq = sequence([*range(9)])
    assert run(cache, seq) == 0
    assert list(seq.blocks) == [0, 1, 2]
    assert (cache.capacity, cache.num_free_blocks) == (40, 7)
    assert cache.usage == pytest.approx(0.3)
    cache.check([seq])


def test_full_blocks_of_a_prompt_are_found_again_and_the_newest_token_never() -> None:
    """The last block is copied, because the newest token is written to it."""
    cache = CacheManager(10, 4)
    first = sequence([*range(8)])
    run(cache, first)
    same, longer = sequence([*range(8)]), sequence([*range(9)])
    assert (cache.lookup(same), cache.lookup(longer)) == (4, 8)
    assert (start(cache, same), start(cache, longer)) == (7, 8)
    assert (list(same.blocks), list(longer.blocks)) == ([0, 2], [0, 1])
    assert compute(cache, same) == ((1, 2),)
    cache.check([first, same, longer])


def test_released_blocks_stay_findable_and_the_tail_goes_first() -> None:
    cache = CacheManager(4, 4)
    first = sequence([*range(13)])
    run(cache, first)
    cache.release(first)
    assert (cache.num_free_blocks, cache.stats()["num_entries"]) == (4, 3)
    other = sequence([50, 51, 52, 53, 54])
    run(cache, other)
    assert list(other.blocks) == [3, 2], "the empty block, then the cached tail"
    assert cache.lookup(sequence([*range(13)])) == 8
    assert cache.stats()["evictions"] == 1
    cache.check([other])


def test_most_recently_used_prefix_survives() -> None:
    cache = CacheManager(4, 4)
    old, new = sequence([*range(5)]), sequence([*range(20, 25)])
    for seq in (old, new):
        run(cache, seq)
    cache.release(old)
    cache.release(new)
    revived = sequence([*range(5)])
    assert run(cache, revived) == 4
    cache.release(revived)
    run(cache, sequence([*range(30, 39)]))
    assert cache.lookup(sequence([*range(5)])) == 4
    assert cache.lookup(sequence([*range(20, 25)])) == 0


def test_number_of_kept_blocks_can_be_limited() -> None:
    cache = CacheManager(10, 4, max_cached_blocks=1)
    seq = sequence([*range(13)])
    run(cache, seq)
    assert cache.stats()["num_entries"] == 3, "blocks in use do not count"
    cache.release(seq)
    assert cache.stats()["num_entries"] == 1
    assert cache.lookup(sequence([*range(13)])) == 4
    cache.check([])


def test_reserve_is_all_or_nothing() -> None:
    cache = CacheManager(3, 4)
    first, second = sequence([1] * 5), sequence([2] * 9)
    run(cache, first)
    start(cache, second)
    assert not cache.reserve(second, 9)
    assert (list(second.blocks), cache.num_free_blocks) == ([], 1)
    assert cache.reserve(second, 4)
    assert list(second.blocks) == [2]


def test_slot_is_there_while_a_block_of_its_own_has_two_to_fill() -> None:
    cache = CacheManager(10, 4)
    seq = sequence([*range(6)])
    run(cache, seq)
    has_slot = []
    for token in range(6, 10):
        seq.tokens.append(token)
        has_slot.append(cache.has_slot(seq))
        compute(cache, seq)
    assert has_slot == [True, False, False, True], "7 completes its block, 8 has none"


def test_shared_block_has_no_slot() -> None:
    cache = CacheManager(10, 4)
    parent, child = sequence([*range(6)]), sequence([*range(6)])
    run(cache, parent)
    child.computed = cache.fork(parent, child)
    parent.tokens.append(6)
    assert not cache.has_slot(parent)
    assert not cache.has_slot(child)
    compute(cache, child)
    assert cache.has_slot(parent)


def test_fits_counts_revived_blocks_and_the_margin() -> None:
    cache = CacheManager(4, 4)
    first = sequence([*range(9)])
    run(cache, first)
    again = sequence([*range(12)])
    assert cache.fits(again, 0), "two shared, one free"
    assert not cache.fits(again, 1)
    cache.release(first)
    assert cache.fits(again, 1)
    assert not cache.fits(again, 2), "a revived block is free no more"
    assert cache.fits(again, -9)


def test_blocks_freed_by_leaving_count_shared_ones_only_when_all_leave() -> None:
    cache = CacheManager(10, 4)
    first, second = sequence([*range(9)]), sequence([*range(9)])
    run(cache, first)
    run(cache, second)
    assert (list(first.blocks), list(second.blocks)) == ([0, 1, 2], [0, 1, 3])
    assert cache.num_freed_by([first]) == 1
    assert cache.num_freed_by([first, second]) == 4


def test_stats_count_tokens() -> None:
    cache = CacheManager(10, 4)
    assert cache.stats()["hit_rate"] == 0.0
    for _ in range(2):
        run(cache, sequence([*range(10)]))
    stats = cache.stats()
    assert (stats["query_tokens"], stats["hit_tokens"], stats["hit_rate"]) == (20, 8, 0.4)
    assert (stats["num_entries"], stats["total_size"], stats["num_free_blocks"]) == (2, 8, 6)


def test_check_notices_a_leak() -> None:
    cache = CacheManager(10, 4)
    seq = sequence([*range(9)])
    run(cache, seq)
    with pytest.raises(AssertionError):
        cache.check([])
    del seq.blocks[-1]
    with pytest.raises(AssertionError):
        cache.check([seq])
