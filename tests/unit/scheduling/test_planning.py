"""What a step runs, by hand: 10 blocks of 4 tokens."""

from __future__ import annotations

import pytest

from penstock.errors import RequestTooLarge
from penstock.sampling import SamplingParams
from penstock.scores import Score, ScorePart
from penstock.scoring import ScoringParams
from penstock.sequence import FinishReason, Status
from penstock.step import Event, RowResult
from tests.unit.scheduling.world import CRITICAL, HIGH, LOW, NORMAL, World


def test_a_request_is_prefilled_and_then_decoded() -> None:
    world = World()
    world.add(1, 6, new=3)
    assert world.drain() == [[1], [1], [1]]
    assert world.cache.num_free_blocks == 10


def test_rows_name_the_live_tokens_and_blocks() -> None:
    world = World()
    seq = world.add(1, 6, seed=5, sample_index=2, stop_ids=frozenset([3]))
    assert world.begin() == {1: (0, 6)}
    (row,) = world.plan.rows
    assert row.tokens is seq.tokens
    assert row.blocks is seq.blocks
    assert list(row.blocks) == [0, 1]
    assert (row.samples, row.prompt_len, row.seed, row.sample_index) == (True, 6, 5, 2)
    assert (row.params, row.stop_ids) == (seq.params, frozenset([3]))
    assert (seq.in_flight, seq.todo, seq.status) == (6, 0, Status.RUNNING)
    world.end()
    assert (seq.in_flight, seq.computed, seq.todo) == (0, 6, 1)


def test_rows_of_decoding_sequences_say_the_same_wherever_their_token_lies() -> None:
    """Positions 6 and 7 lie in a block that is there, 8 in a new one."""
    world = World()
    seq = world.add(1, 6, seed=5, sample_index=2, stop_ids=frozenset([3]))
    world.step()
    for start in (6, 7, 8):
        assert world.begin() == {1: (start, start + 1)}
        (row,) = world.plan.rows
        assert (row.seq_id, row.samples, row.prompt_len, row.seed, row.sample_index) == (1, True, 6, 5, 2)
        assert (row.params, row.stop_ids, row.draft) == (seq.params, frozenset([3]), ())
        assert row.tokens is seq.tokens
        assert row.blocks is seq.blocks
        assert len(row.blocks) == start // 4 + 1
        assert (seq.in_flight, seq.todo) == (1, 0)
        world.end()


def test_nothing_to_do_is_an_empty_plan() -> None:
    world = World()
    assert world.begin() == {}
    assert not world.scheduler.has_work
    assert world.begin() == {}, "and it need not be committed"


def test_long_prompts_are_prefilled_in_chunks() -> None:
    world = World(max_num_batched_tokens=6)
    world.add(1, 15)
    assert [world.step() for _ in range(4)] == [{1: (0, 6)}, {1: (6, 12)}, {1: (12, 15)}, {1: (15, 16)}]


def test_prefill_never_starves_a_decode() -> None:
    world = World(max_num_batched_tokens=6)
    world.add(1, 3, new=9)
    world.add(2, 3, new=9)
    world.step()
    world.add(3, 15, priority=CRITICAL)
    assert world.step() == {3: (0, 4), 1: (3, 4), 2: (3, 4)}
    assert world.step() == {3: (4, 8), 1: (4, 5), 2: (4, 5)}


def test_batch_size_is_read_at_every_step() -> None:
    world = World(max_batch_size=1)
    for number in (1, 2, 3):
        world.add(number, 3, new=9)
    assert list(world.step()) == [1]
    world.config.max_batch_size = 3
    assert list(world.step()) == [1, 2, 3]
    world.config.max_batch_size = 2
    assert list(world.step()) == [1, 2], "the third keeps its place and waits"
    assert world.scheduler.num_running == 3


def test_step_tokens_are_read_at_every_step() -> None:
    world = World(max_num_batched_tokens=4)
    world.add(1, 12)
    assert world.step() == {1: (0, 4)}
    world.config.max_num_batched_tokens = 8
    assert world.step() == {1: (4, 12)}


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    world = World()
    with pytest.raises(RequestTooLarge, match=r"30 prompt tokens and 11 new ones are 41.* holds 40"):
        world.add(1, 30, new=11)
    assert not world.scheduler.has_work
    world.add(2, 30, new=10)
    assert len(world.drain()) == 10


def test_two_requests_share_a_prefix_within_one_step() -> None:
    world = World()
    first, second = world.add(1, [*range(9)]), world.add(2, [*range(8), 50])
    assert world.begin() == {1: (0, 9), 2: (8, 9)}
    assert (list(first.blocks), list(second.blocks)) == ([0, 1, 2], [0, 1, 3])
    assert world.cache.num_free_blocks == 6


def test_scored_prompts_are_chunked_by_half_of_the_logit_rows() -> None:
    world = World(max_logit_rows=6)
    world.add(1, 3, new=9)
    world.step()
    world.add(2, 9, new=1, params=SamplingParams(max_tokens=1, prompt_logprobs=0))
    scored = []
    for planned in ({1: (3, 4), 2: (0, 3)}, {1: (4, 5), 2: (3, 6)}, {1: (5, 6), 2: (6, 9)}):
        assert world.step() == planned
        scored.append(world.plan.rows[1].scored)
    assert scored == [range(1, 4), range(4, 7), range(7, 9)]


def test_a_score_reads_cached_blocks_before_its_range_and_samples_nothing() -> None:
    world = World()
    world.add(1, [*range(9)], new=1)
    world.drain()
    seq = world.add(2, [*range(9), 50, 51], new=0, params=ScoringParams(num_scored=2))
    assert (seq.scored, seq.max_cached) == (range(9, 11), 8)
    assert world.begin() == {2: (8, 11)}
    (row,) = world.plan.rows
    assert (row.scored, row.samples) == (range(9, 11), False)
    scores = ScorePart(0, Score([-1.0, -2.0]))
    assert world.end({2: RowResult(scores=scores)}) == [
        Event(2, reason=FinishReason.STOP, num_cached_tokens=8, scores=scores)
    ]
    assert not world.scheduler.has_work


def test_a_score_never_reads_its_own_range_from_the_cache() -> None:
    world = World()
    world.add(1, [*range(9)], new=1)
    world.drain()
    world.add(2, [*range(9)], new=0, params=ScoringParams(num_scored=4))
    assert world.begin() == {2: (4, 9)}, "the logits in front of position 5 are needed"
    assert world.plan.rows[0].scored == range(5, 9)


def test_the_part_of_a_prompt_before_a_score_is_not_bounded_by_logits() -> None:
    world = World(max_logit_rows=4)
    world.add(1, 12, new=0, params=ScoringParams(num_scored=3))
    assert world.step() == {1: (0, 10)}
    assert world.plan.rows[0].scored == range(9, 11)
    assert world.step() == {1: (10, 12)}
    assert world.plan.rows[0].scored == range(11, 12)


def test_unscored_prompts_cost_one_logit_row() -> None:
    world = World(max_logit_rows=2)
    world.add(1, 12)
    world.add(2, 9)
    world.add(3, 5)
    assert world.step() == {1: (0, 12), 2: (0, 9)}


def test_a_start_needs_room_for_the_whole_prompt_and_a_margin() -> None:
    world = World()
    world.add(1, 20, new=4)
    world.add(2, 17, new=4)
    for _ in range(4):
        assert list(world.step()) == [1], "the second would fill all five free blocks, and the first soon needs one"
    assert list(world.step()) == [2]


def test_a_started_prompt_has_all_its_blocks() -> None:
    world = World(max_num_batched_tokens=4)
    seq = world.add(1, 20, new=4)
    assert world.step() == {1: (0, 4)}
    assert list(seq.blocks) == [0, 1, 2, 3, 4]


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    world = World()
    world.add(1, 16, new=4)
    world.add(2, 24, new=4)
    world.add(3, 2, new=4)
    assert list(world.step()) == [1]
    assert list(world.step()) == [1]
    assert [seq.id for seq in world.scheduler.take_started()] == [1]
    assert world.drain()[2:4] == [[2, 3], [2, 3]]


def test_the_worst_running_request_is_the_victim_and_comes_back_with_its_tokens() -> None:
    world = World(num_blocks=6)
    first, second = world.add(1, 8, new=16), world.add(2, 7, new=16)
    world.step()
    while second.status is Status.RUNNING:
        world.step()
    assert (first.length, second.length) == (14, 12), "position 12 of the first needed a fourth block"
    assert (second.computed, list(second.blocks), second.todo) == (0, [], 12)
    assert world.scheduler.stats()["num_preemptions"] == 1
    world.drain()
    assert (first.num_generated, second.num_generated) == (16, 16)


def test_a_victim_does_not_return_until_it_fits_with_a_margin() -> None:
    """Otherwise it would take turns with the one it made room for."""
    world = World(num_blocks=6)
    world.add(1, 8, new=16)
    world.add(2, 7, new=16)
    world.drain()
    assert world.scheduler.stats()["num_preemptions"] == 1


def test_a_victim_finds_its_own_blocks_again() -> None:
    world = World(num_blocks=8, max_batch_size=1)
    low = world.add(1, 12, new=8, priority=LOW)
    world.step()
    world.step()
    world.add(2, 4, new=1, priority=HIGH)
    assert world.step() == {2: (0, 4)}
    assert world.step() == {1: (12, 14)}
    assert low.computed == 14


def test_started_sequences_are_told_once() -> None:
    world = World(max_batch_size=1)
    low = world.add(1, 3, new=9, priority=LOW)
    world.step()
    assert world.scheduler.take_started() == [low]
    high = world.add(2, 3, new=1, priority=NORMAL)
    world.step()
    world.step()
    assert low.status is Status.RUNNING
    assert world.scheduler.take_started() == [high], "a victim that comes back has started before"
    assert world.scheduler.take_started() == []
