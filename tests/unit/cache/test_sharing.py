"""Who shares which block, and when it is copied: 10 blocks of 4 tokens, exact block ids."""

from __future__ import annotations

from penstock.cache.manager import CacheManager
from penstock.sampling import SamplingParams
from penstock.scoring import ScoringParams
from tests.unit.cache.hand import compute, run, sequence, start


def test_another_namespace_shares_nothing() -> None:
    cache = CacheManager(10, 4)
    run(cache, sequence([*range(9)], namespace="a"))
    assert cache.lookup(sequence([*range(9)], namespace="a")) == 8
    assert cache.lookup(sequence([*range(9)], namespace="b")) == 0


def test_prompt_logprobs_need_every_position() -> None:
    cache = CacheManager(10, 4)
    first = sequence([*range(9)])
    run(cache, first)
    wants_all = sequence([*range(9)], params=SamplingParams(prompt_logprobs=0), parent=first)
    assert start(cache, wants_all) == 0
    compute(cache, wants_all)
    assert list(wants_all.blocks) == [3, 4, 5]
    cache.check([first, wants_all])


def test_a_score_copies_the_block_that_its_range_begins_in() -> None:
    """It computed the tokens of that block before its range again: up to a block's, for a response of any length."""
    cache = CacheManager(10, 4)
    prompt = sequence([*range(8)])
    run(cache, prompt)
    cache.release(prompt)
    scores = [sequence([*range(8), 20 + i, 30 + i], params=ScoringParams(num_scored=2)) for i in range(3)]
    assert [start(cache, score) for score in scores] == [7, 7, 7], "the token in front of the range is left"
    assert [list(score.blocks) for score in scores] == [[0, 2], [0, 3], [0, 4]]
    assert all(cache.reserve(score, 10) for score in scores)
    assert cache.take_moves().copies == ((1, 2), (1, 3), (1, 4))
    cache.check(scores)
    cache.commit()
    assert cache.lookup(sequence([*range(9)])) == 8, "the block stays findable"
    cache.check(scores)


def test_a_block_that_this_step_fills_is_not_copied() -> None:
    """Copies run before rows write: the copy would hold what the block held before."""
    cache = CacheManager(10, 4)
    first, score = sequence([*range(8)]), sequence([*range(9)], params=ScoringParams(num_scored=1))
    start(cache, first)
    assert cache.reserve(first, 8)
    cache.seal(first, 8)
    assert start(cache, score) == 4
    cache.check([first, score])


def test_a_block_is_not_copied_where_that_would_take_the_last_free_one() -> None:
    cache = CacheManager(3, 4)
    first = sequence([*range(8)])
    run(cache, first)
    cache.release(first)
    score = sequence([*range(8), 20, 21], params=ScoringParams(num_scored=2))
    assert cache.fits(score)
    assert run(cache, score) == 4, "two blocks are shared or copied, and one more is needed for the copy to be made"
    cache.check([score])


def test_a_released_sequence_with_other_tokens_does_not_get_the_blocks_of_the_old_ones() -> None:
    """A beam that becomes the continuation of another one."""
    cache = CacheManager(10, 4)
    beam = sequence([*range(9)])
    run(cache, beam)
    cache.release(beam)
    beam.computed = 0
    assert cache.lookup(beam) == 8
    cache.release(beam)
    beam.tokens[:] = [*range(4), *range(50, 55)]
    assert cache.lookup(beam) == 4


def test_what_a_fork_of_less_than_a_block_writes_can_be_found() -> None:
    cache = CacheManager(10, 4)
    parent, child = sequence([0, 1, 2]), sequence([0, 1, 2, 50])
    run(cache, parent)
    child.computed = cache.fork(parent, child)
    assert child.computed == 3
    child.tokens += range(51, 56)
    compute(cache, child)
    assert cache.lookup(sequence([0, 1, 2, *range(50, 56)])) == 8


def test_without_prefix_caching_only_siblings_share() -> None:
    cache = CacheManager(10, 4, enable_prefix_caching=False)
    first = sequence([*range(9)], request_id="r")
    sibling = sequence([*range(9)], request_id="r", parent=first)
    run(cache, first)
    assert cache.lookup(sequence([*range(9)])) == 0
    assert cache.lookup(sequence([*range(9)], request_id="r")) == 0, "callers may use an id twice"
    assert cache.lookup(sibling) == 8


def test_blocks_sealed_in_a_step_are_shared_in_the_same_step() -> None:
    cache = CacheManager(10, 4)
    first, second = sequence([*range(9)]), sequence([*range(8), 100])
    start(cache, first)
    assert cache.reserve(first, 9)
    cache.seal(first, 9)
    assert start(cache, second) == 8
    assert list(second.blocks) == [0, 1]


def test_rollback_makes_the_step_unfindable() -> None:
    cache = CacheManager(10, 4)
    old, failed = sequence([*range(9)]), sequence([*range(8), *range(50, 55)])
    run(cache, old)
    start(cache, failed)
    assert cache.reserve(failed, 13)
    cache.seal(failed, 13)
    assert cache.lookup(sequence([*range(8), *range(50, 60)])) == 12
    cache.rollback()
    assert cache.lookup(sequence([*range(8), *range(50, 60)])) == 8, "what was there before stays"
    cache.release(failed)
    cache.check([old])


def test_sibling_shares_the_settled_part_of_a_partial_block_and_copies_it() -> None:
    cache = CacheManager(10, 4)
    first = sequence([*range(7)])
    run(cache, first)
    sibling = sequence([*range(7)], parent=first, request_id=first.request_id)
    assert start(cache, sibling) == 6
    assert list(sibling.blocks) == [0, 1]
    assert compute(cache, sibling) == ((1, 2),)
    assert list(sibling.blocks) == [0, 2]
    assert compute(cache, first, 8) == (), "the copy left the first one alone with its block"
    cache.check([first, sibling])


def test_unsettled_tail_of_a_sibling_is_not_shared() -> None:
    cache = CacheManager(10, 4)
    first = sequence([*range(7)])
    start(cache, first)
    assert cache.reserve(first, 7)
    cache.seal(first, 7)
    first.in_flight = 7
    assert start(cache, sequence([*range(7)], parent=first)) == 4


def test_sibling_with_another_prompt_or_namespace_shares_no_tail() -> None:
    cache = CacheManager(10, 4)
    first = sequence([*range(7)], namespace="a")
    run(cache, first)
    assert start(cache, sequence([0, 1, 2, 3, 4, 9, 6], parent=first, namespace="a")) == 4
    assert start(cache, sequence([*range(7)], parent=first, namespace="b")) == 0


def test_source_of_a_copy_is_kept_until_the_step_is_over() -> None:
    cache = CacheManager(3, 4)
    parent, child = sequence([*range(6)]), sequence([*range(6), 9])
    run(cache, parent)
    child.computed = cache.fork(parent, child)
    assert (child.computed, list(child.blocks)) == (6, [0, 1])
    assert cache.reserve(child, 7)
    cache.release(parent)
    assert cache.num_free_blocks == 0, "block 1 is a source"
    cache.check([child])
    assert cache.take_moves().copies == ((1, 2),)
    cache.commit()
    assert cache.num_free_blocks == 1
    cache.check([child])


def test_last_holder_of_a_shared_block_writes_it_in_place() -> None:
    cache = CacheManager(10, 4)
    parent, child = sequence([*range(6)]), sequence([*range(6), 9])
    run(cache, parent)
    child.computed = cache.fork(parent, child)
    parent.tokens.append(7)
    assert cache.reserve(parent, 7)
    assert cache.reserve(child, 7)
    assert (list(parent.blocks), list(child.blocks)) == ([0, 2], [0, 1])
    assert cache.take_moves().copies == ((1, 2),)


def test_copy_of_a_copy_reads_the_original() -> None:
    """Copies of one step may run in any order."""
    cache = CacheManager(10, 4)
    parent, child, grandchild = sequence([*range(6)]), sequence([*range(6), 8]), sequence([*range(6), 9])
    run(cache, parent)
    child.computed = cache.fork(parent, child)
    assert cache.reserve(child, 7)
    grandchild.computed = cache.fork(child, grandchild)
    assert cache.reserve(grandchild, 7)
    assert cache.take_moves().copies == ((1, 2), (1, 3))
    cache.commit()
    cache.check([parent, child, grandchild])


def test_writing_into_a_findable_block_makes_it_unfindable() -> None:
    """A fork may end inside a block that its parent had filled; once the parent left, nobody else guards it."""
    cache = CacheManager(10, 4)
    parent, child = sequence([*range(9)]), sequence([0, 1, 2, 3, 4, 5, 99, 98])
    run(cache, parent)
    parent.computed = 6
    child.computed = cache.fork(parent, child)
    cache.release(parent)
    compute(cache, child)
    assert list(child.blocks) == [0, 1]
    assert cache.lookup(sequence([*range(9)])) == 4
    assert cache.lookup(sequence([0, 1, 2, 3, 4, 5, 99, 98, 97])) == 8
    cache.check([child])


def test_drafts_are_not_sealed() -> None:
    cache = CacheManager(10, 4)
    seq = sequence([*range(7)])
    run(cache, seq, 6)
    assert cache.reserve(seq, 12)
    cache.seal(seq, 7)
    assert (len(seq.blocks), cache.stats()["num_entries"]) == (3, 1)


def test_new_weights_find_nothing_old_and_nothing_half_old() -> None:
    cache = CacheManager(10, 4)
    running = sequence([*range(9)])
    run(cache, running)
    cache.reset(weight_version=1)
    assert cache.stats()["num_entries"] == 0
    running.tokens += range(9, 13)
    compute(cache, running)
    assert cache.stats()["num_entries"] == 0, "its K/V come from two versions"
    sibling = sequence([*range(9)], parent=running)
    assert start(cache, sibling) == 0
    compute(cache, sibling)
    assert cache.lookup(sequence([*range(9)])) == 8
    cache.release(running)
    cache.check([sibling])
