"""Blocks that leave the cache for the host and come back: blocks of 4 tokens, exact block and place ids."""

from __future__ import annotations

from penstock.cache.manager import CacheManager
from penstock.sampling import SamplingParams
from tests.unit.cache.hand import run, sequence, start
from tests.unit.cache.test_readback import plan

FIRST, OTHER = [*range(13)], [*range(50, 63)]


def cache_after_eviction() -> CacheManager:
    """4 blocks. FIRST filled three of them and left; OTHER has just taken all four."""
    cache = cache_with(FIRST, num_host_blocks=4)
    other = sequence(OTHER)
    start(cache, other)
    assert cache.reserve(other, 13)
    assert list(other.blocks) == [3, 2, 1, 0]
    return cache


def cache_with(*prompts: list[int], num_host_blocks: int = 8) -> CacheManager:
    """4 blocks, after these prompts ran one by one."""
    cache = CacheManager(4, 4, num_host_blocks=num_host_blocks)
    for prompt in prompts:
        seq = sequence(prompt)
        run(cache, seq)
        cache.release(seq)
    return cache


def test_evicted_blocks_go_out_in_the_step_that_evicts_them_the_tail_first() -> None:
    cache = cache_after_eviction()
    assert cache.take_moves()[1:] == (((2, 0), (1, 1), (0, 2)), ())
    cache.commit()
    stats = cache.stats()
    assert (stats["num_host_blocks"], stats["num_host_entries"], stats["swapped_out"]) == (4, 3, 3)


def test_a_prefix_on_the_host_is_found_and_read_back() -> None:
    cache = CacheManager(6, 4, num_host_blocks=4)
    first, other = sequence(FIRST), sequence([*range(50, 70)])
    run(cache, first)
    cache.release(first)
    run(cache, other)
    assert list(other.blocks) == [3, 4, 5, 2, 1], "block 0 still holds the first block of FIRST"
    cache.release(other)
    again = sequence(FIRST)
    assert cache.lookup(again) == 12
    assert start(cache, again) == 12
    assert list(again.blocks) == [0, 1, 2], "one was here, two come from the host, evicting the tail of the other"
    assert cache.take_moves()[1:] == (((1, 2), (2, 3)), ((1, 1), (0, 2)))
    cache.commit()
    cache.check([again])
    sharer = sequence(FIRST)
    assert start(cache, sharer) == 12
    assert list(sharer.blocks) == [0, 1, 2]
    assert cache.take_moves()[1:] == ((), ())
    cache.check([again, sharer])


def test_blocks_read_back_need_room_like_blocks_to_be_computed() -> None:
    cache = cache_with(FIRST, OTHER)
    assert cache.lookup(sequence(FIRST)) == 12
    assert cache.fits(sequence(FIRST))
    assert not cache.fits(sequence(FIRST), 1), "three to read into, and one for the newest token"


def test_evicting_again_what_the_host_still_holds_moves_nothing() -> None:
    cache = cache_with(FIRST, OTHER, FIRST, OTHER)
    stats = cache.stats()
    assert (stats["swapped_out"], stats["swapped_in"], stats["num_host_entries"]) == (6, 6, 6)
    cache.check([])


def test_the_block_that_is_read_is_safe_from_those_that_go_out_for_it() -> None:
    cache = cache_with(FIRST, OTHER, num_host_blocks=3)
    again = sequence(FIRST)
    assert start(cache, again) == 12
    assert cache.reserve(again, 13)
    assert cache.take_moves()[1:] == ((), ((2, 0), (1, 1), (0, 2))), "no place was left for the blocks of OTHER"
    cache.commit()
    assert cache.lookup(sequence(OTHER)) == 0
    cache.check([again])


def test_a_failed_step_forgets_what_it_moved_but_not_what_lay_there() -> None:
    cache = cache_with(FIRST, OTHER, num_host_blocks=6)
    again = sequence(FIRST)
    assert start(cache, again) == 12
    assert cache.reserve(again, 13)
    assert len(cache.take_moves().swaps_out) == 3
    cache.rollback()
    cache.release(again)
    cache.check([])
    assert cache.stats()["num_host_entries"] == 3
    assert cache.lookup(sequence(FIRST)) == 12
    assert cache.lookup(sequence(OTHER)) == 0


def test_where_reading_is_dearer_than_computing_nothing_is_read() -> None:
    cache = cache_after_eviction()
    cache.commit(plan(100, moved=1), {"swap": 0.036, "forward": 1.0})
    assert cache.lookup(sequence(FIRST)) == 12
    cache.commit(plan(100, moved=1), {"swap": 0.050, "forward": 1.0})
    assert cache.lookup(sequence(FIRST)) == 0


def test_reset_clears_the_host_too() -> None:
    cache = cache_after_eviction()
    cache.commit()
    cache.reset()
    assert cache.lookup(sequence(FIRST)) == 0
    assert cache.stats()["num_host_entries"] == 0


def test_namespaces_and_prompt_logprobs_find_nothing_on_the_host_either() -> None:
    cache = cache_after_eviction()
    cache.commit()
    assert cache.lookup(sequence(FIRST)) == 12
    assert cache.lookup(sequence(FIRST, namespace="tenant")) == 0
    assert cache.lookup(sequence(FIRST, params=SamplingParams(prompt_logprobs=0))) == 0


def test_blocks_beyond_the_limit_of_kept_ones_are_dropped_not_moved() -> None:
    cache = CacheManager(4, 4, max_cached_blocks=1, num_host_blocks=4)
    seq = sequence(FIRST)
    run(cache, seq)
    cache.release(seq)
    assert cache.stats()["num_host_entries"] == 0
    assert cache.lookup(sequence(FIRST)) == 4


def test_what_nobody_holds_can_be_dropped() -> None:
    cache = cache_with(FIRST, OTHER)
    held = sequence(OTHER[:6])
    run(cache, held)
    assert cache.unused() == ([], [])
    cache.drop_unused()
    blocks, places = cache.unused()
    assert (sorted(blocks), sorted(places)) == ([1, 2], [0, 1, 2])
    assert (cache.lookup(sequence(FIRST)), cache.lookup(sequence(OTHER))) == (0, 4)
    cache.check([held])
