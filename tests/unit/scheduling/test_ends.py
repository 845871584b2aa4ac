"""What a step's result means: tokens, drafts, ends and their one terminal event."""

from __future__ import annotations

import math

import pytest

from penstock.sampling import SamplingParams
from penstock.scoring import ScoringParams
from penstock.sequence import FinishReason, Status
from penstock.step import Event, RowResult, StepResult, TokenLogprobs, record_of
from tests.unit.scheduling.world import HIGH, LOW, NORMAL, TOKEN, World


def scores(*tokens: int) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(token, -1.0, -1.0) for token in tokens)


def test_events_carry_tokens_and_their_logprobs() -> None:
    world = World()
    world.add(1, 3, new=2)
    world.begin()
    assert world.end({1: RowResult((5,), scores(5))}) == [Event(1, (5,), scores(5))]
    world.begin()
    assert world.end() == [Event(1, (TOKEN,), reason=FinishReason.LENGTH)]
    assert world.scheduler.get(1) is None


def test_a_prefill_chunk_is_no_news() -> None:
    world = World(max_num_batched_tokens=4)
    world.add(1, 6)
    world.begin()
    assert world.end() == []


def test_the_first_event_tells_the_prefix_hit_once() -> None:
    world = World()
    world.add(1, [*range(9)])
    world.add(2, [*range(9)], new=2)
    world.begin()
    assert [event.num_cached_tokens for event in world.end()] == [0, 8]
    world.begin()
    assert [event.num_cached_tokens for event in world.end()] == [0, 0]


def test_a_stop_id_ends_it_unless_it_comes_too_early() -> None:
    world = World()
    params = SamplingParams(max_tokens=9, min_tokens=1)
    seq = world.add(1, 3, new=9, params=params, stop_ids=frozenset([5]))
    world.begin()
    assert world.end({1: (5,)}) == [Event(1, (5,))]
    world.begin()
    assert world.end({1: (5,)}) == [Event(1, (5,), reason=FinishReason.STOP, stop_token=5)]
    assert (seq.status, seq.reason, list(seq.blocks)) == (Status.FINISHED, FinishReason.STOP, [])


def test_an_error_in_one_row_ends_that_row_alone() -> None:
    world = World()
    first, second = world.add(1, 3), world.add(2, 3)
    error = RuntimeError("a logits processor raised")
    world.begin()
    assert world.end({1: RowResult(error=error)}) == [
        Event(1, reason=FinishReason.ERROR, error=error),
        Event(2, (TOKEN,)),
    ]
    assert (first.status, second.status) == (Status.FINISHED, Status.RUNNING)


def test_a_failed_step_ends_its_sequences_and_nobody_else() -> None:
    world = World(max_batch_size=1)
    world.add(1, [*range(9)])
    waiting = world.add(2, [*range(9)], new=1)
    error = RuntimeError("out of luck")
    world.begin()
    assert world.scheduler.fail(world.plan, error) == [Event(1, reason=FinishReason.ERROR, error=error)]
    assert world.cache.stats()["num_entries"] == 0
    assert world.begin() == {2: (0, 9)}, "nothing of the failed step is found"
    assert world.end()[0].reason is FinishReason.LENGTH
    assert waiting.num_generated == 1


def test_a_score_that_was_started_without_a_row_uses_nothing_of_a_failed_step() -> None:
    """It went on with blocks that the step was to fill (a prompt of 9) or to copy (one of 8), and had not."""
    for prompt, cached in ([*range(9)], 0), ([*range(8)], 4):
        world = World(max_logit_rows=4)
        if cached:
            world.add(1, prompt, new=1)
            world.step()
        first, second = ([*prompt, *range(begin, begin + 3)] for begin in (50, 60))
        world.add(2, first, new=0, params=ScoringParams(num_scored=3))
        score = world.add(3, second, new=0, params=ScoringParams(num_scored=3))
        assert list(world.begin()) == [2], "two rows of logits serve the first score alone"
        assert score.status is Status.RUNNING
        world.scheduler.fail(world.plan, RuntimeError("out of luck"))
        assert (score.status, score.computed, list(score.blocks)) == (Status.WAITING, 0, [])
        world.drain()


def test_a_step_that_is_restarted_is_planned_anew_from_the_first_token_on() -> None:
    """All that run are computed again, and nothing that is cached is found."""
    world = World(max_batch_size=2)
    first, second = world.add(1, [*range(9)], new=3), world.add(2, [*range(9)], new=3)
    assert world.step() == {1: (0, 9), 2: (8, 9)}
    assert world.begin() == {1: (9, 10), 2: (9, 10)}
    assert world.scheduler.restart(world.plan) == []
    assert (first.computed, list(first.blocks), second.computed, list(second.blocks)) == (0, [], 0, [])
    assert world.begin() == {1: (0, 10), 2: (8, 10)}, "only of each other, in the new step"
    world.end()
    world.drain()
    assert (first.num_generated, second.num_generated) == (3, 3)


def test_an_abort_during_a_step_that_is_restarted_ends_with_it() -> None:
    world = World()
    world.add(1, 3)
    other = world.add(2, 3)
    world.begin()
    world.scheduler.finish(1)
    assert world.scheduler.restart(world.plan) == [Event(1, reason=FinishReason.ABORT)]
    assert world.begin() == {2: (0, 3)}
    world.end()
    assert other.num_generated == 1


def test_abort_is_immediate_unless_the_step_names_it() -> None:
    world = World(max_batch_size=1)
    running = world.add(1, 3)
    world.add(2, 3)
    world.begin()
    assert world.scheduler.finish(2) == [Event(2, reason=FinishReason.ABORT)]
    assert world.scheduler.finish(1) == []
    assert world.scheduler.finish(1, FinishReason.STOP) == [], "the first reason stays"
    assert list(running.blocks) == [0], "the executing step may still write it"
    assert world.end() == [Event(1, reason=FinishReason.ABORT)]
    assert (running.num_generated, list(running.blocks), running.reason) == (0, [], FinishReason.ABORT)
    assert not world.scheduler.has_work


def test_an_abort_during_a_step_that_fails_is_an_abort() -> None:
    world = World()
    world.add(1, 3)
    world.begin()
    world.scheduler.finish(1)
    assert world.scheduler.fail(world.plan, RuntimeError()) == [Event(1, reason=FinishReason.ABORT)]


def test_a_fault_from_outside_carries_its_error() -> None:
    world = World()
    world.add(1, 3)
    error = RuntimeError("the detokenizer raised")
    world.begin()
    world.scheduler.finish(1, FinishReason.ERROR, error)
    assert world.end() == [Event(1, reason=FinishReason.ERROR, error=error)]


def test_unknown_and_ended_ids_mean_nothing() -> None:
    world = World()
    world.add(1, 3)
    assert len(world.scheduler.finish(1)) == 1
    assert world.scheduler.finish(1) == world.scheduler.finish(99) == []


def test_deadlines_end_waiting_and_running_ones() -> None:
    world = World(max_batch_size=1)
    world.add(1, 3, deadline=5.0)
    world.add(2, 3, deadline=4.0, priority=LOW)
    assert world.scheduler.next_deadline == 4.0
    world.step()
    assert world.scheduler.expire(3.9) == []
    assert world.scheduler.expire(4.0) == [Event(2, reason=FinishReason.DEADLINE)]
    world.begin()
    assert world.scheduler.expire(6.0) == []
    assert world.end() == [Event(1, reason=FinishReason.DEADLINE)]
    assert world.scheduler.next_deadline == math.inf


def test_the_first_token_deadline_counts_only_without_a_token() -> None:
    world = World(max_batch_size=1)
    world.add(1, 3, ttft_deadline=5.0)
    world.add(2, 3, ttft_deadline=5.0)
    world.step()
    assert world.scheduler.expire(5.0) == [Event(2, reason=FinishReason.DEADLINE)]


def test_deadlines_of_ended_sequences_do_not_pile_up() -> None:
    world = World()
    for number in range(2000):
        world.add(number, 1, new=1, deadline=1e9, now=0.0)
        world.step()
    assert world.scheduler.next_deadline == math.inf
    assert world.scheduler.stats()["num_finished_length"] == 2000


def ready(prompt: int = 3, new: int = 20) -> World:
    """One sequence that lacks only its newest token."""
    world = World()
    world.add(1, prompt, new=new)
    world.step()
    return world


def test_a_draft_goes_through_the_model_also_where_a_slot_for_the_newest_token_is_there_already() -> None:
    world = World()
    world.add(1, 5, new=9)
    world.step()
    assert world.step() == {1: (5, 6)}
    world.scheduler.offer(1, [10, 11])
    assert world.begin() == {1: (6, 9)}
    assert world.plan.rows[0].draft == (10, 11)


def test_accepted_drafts_advance_over_their_kv() -> None:
    world = ready()
    seq = world.scheduler.get(1)
    assert seq is not None
    world.scheduler.offer(1, [10, 11, 12])
    assert world.begin() == {1: (3, 7)}
    (row,) = world.plan.rows
    assert (row.draft, row.samples, len(seq.blocks)) == ((10, 11, 12), True, 2)
    assert world.end({1: (10, 11, 12, 13)}) == [Event(1, (10, 11, 12, 13), num_drafted_tokens=3, num_accepted_tokens=3)]
    assert (seq.tokens[3:], seq.computed, seq.draft) == ([TOKEN, 10, 11, 12, 13], 7, ())
    assert world.begin() == {1: (7, 8)}


def test_rejected_drafts_are_not_advanced_over() -> None:
    world = ready()
    seq = world.scheduler.get(1)
    assert seq is not None
    world.scheduler.offer(1, [10, 11, 12])
    world.begin()
    world.end({1: (10, 99)})
    assert (seq.tokens[3:], seq.computed, seq.draft, seq.todo) == ([TOKEN, 10, 99], 5, (), 1)
    assert world.begin() == {1: (5, 6)}


def test_tokens_after_a_stop_are_dropped() -> None:
    world = World()
    seq = world.add(1, 3, new=20, stop_ids=frozenset([11]))
    world.step()
    world.scheduler.offer(1, [10, 11, 12])
    world.begin()
    result = RowResult((10, 11, 12, 13), scores(10, 11, 12, 13))
    event = Event(1, (10, 11), scores(10, 11), reason=FinishReason.STOP, stop_token=11)
    assert world.end({1: result}) == [event._replace(num_drafted_tokens=3, num_accepted_tokens=2)]
    assert seq.tokens[3:] == [TOKEN, 10, 11]


def test_drafts_end_where_the_sequence_must() -> None:
    world = ready(new=4)
    world.scheduler.offer(1, [10, 11, 12, 13, 14])
    assert world.begin() == {1: (3, 6)}
    assert world.end({1: (10, 11, 12)})[0].reason is FinishReason.LENGTH


def test_accepted_drafts_become_findable() -> None:
    world = ready(prompt=7)
    world.scheduler.offer(1, [10, 11, 12, 13])
    world.begin()
    world.end({1: (10, 11, 12, 13, 14)})
    world.scheduler.finish(1)
    again = world.add(2, [*range(100, 107), TOKEN, 10, 11, 12, 13, 14])
    assert world.cache.lookup(again) == 12


def test_drafts_preempt_nobody() -> None:
    world = World(num_blocks=2)
    world.add(1, 3, new=5)
    world.add(2, 2, new=2)
    world.config.max_batch_size = 1
    world.step()
    world.config.max_batch_size = 2
    world.add(3, 2, new=1)
    world.scheduler.offer(1, [10, 11, 12])
    assert world.begin() == {1: (3, 7)}
    world.end({1: (99,)})
    assert world.scheduler.stats()["num_preemptions"] == 0


def test_drafts_are_dropped_where_blocks_lack() -> None:
    """Somebody more important came after the offer."""
    world = World(num_blocks=6)
    first, second = world.add(1, 3, new=12), world.add(2, 3, new=12)
    world.step()
    world.scheduler.offer(2, [10] * 10)
    assert len(second.draft) == 10
    world.add(3, 8, priority=HIGH)
    assert world.begin() == {3: (0, 8), 1: (3, 4), 2: (3, 4)}
    assert (first.draft, second.draft) == ((), ())


def test_nobody_gives_way_to_the_guesses_of_others() -> None:
    world = World(num_blocks=7)
    first, *_ = [world.add(number, 4, new=12) for number in (1, 2, 3)]
    world.step()
    for number in (1, 2):
        world.scheduler.offer(number, [10] * 8)
    assert world.begin() == {1: (4, 12), 2: (4, 8), 3: (4, 5)}
    world.end()
    world.scheduler.finish(3)
    world.scheduler.offer(1, [10] * 8)
    assert len(first.draft) == 8, "what was promised for a step that ran is no matter any more"


def test_drafts_leave_a_block_for_everybody_else() -> None:
    world = World(num_blocks=3)
    first, second = world.add(1, 3, new=8), world.add(2, 2, new=8)
    world.step()
    for number in (1, 2):
        world.scheduler.offer(number, [10] * 8)
    assert (first.draft, second.draft) == ((), (10,)), "the last block is not for guesses; the own block may be filled"


def test_the_record_of_a_step_counts_what_came_of_it() -> None:
    """Not what was drawn behind a stop, nor for a sequence that ended meanwhile."""
    world = World()
    for number in (1, 2):
        world.add(number, 3, new=8, stop_ids=frozenset({11}))
    world.step()
    world.scheduler.offer(1, [10, 11, 12])
    world.begin()
    world.scheduler.finish(2)
    result = StepResult((RowResult((10, 11, 12, 13)), RowResult((TOKEN,))))
    record = record_of(world.plan, result, world.scheduler.commit(world.plan, result), 0.5, 0)
    assert (record.rows, record.tokens, record.generated) == (2, 5, 2)


def test_an_offer_to_anybody_else_is_ignored() -> None:
    world = World(max_batch_size=1, max_num_batched_tokens=4)
    prefilling, waiting = world.add(1, 6), world.add(2, 3)
    world.step()
    for number in (1, 2, 99):
        world.scheduler.offer(number, [1])
    world.begin()
    world.scheduler.offer(1, [1])
    assert (prefilling.draft, waiting.draft) == ((), ())


def test_prompt_logprobs_are_told_once_though_a_victim_computes_them_again() -> None:
    world = World(max_batch_size=1)
    params = SamplingParams(max_tokens=3, prompt_logprobs=0)
    world.add(1, 4, new=3, params=params, priority=LOW)
    world.begin()
    assert world.end({1: RowResult((TOKEN,), prompt_logprobs=scores(1, 2, 3))})[0].prompt_logprobs == scores(1, 2, 3)
    world.add(2, 3, new=1, priority=NORMAL)
    assert list(world.step()) == [2]
    assert world.begin() == {1: (0, 5)}
    assert world.end({1: RowResult((TOKEN,), prompt_logprobs=scores(1, 2, 3))}) == [Event(1, (TOKEN,))]


def test_a_plan_must_be_settled_before_the_next_one() -> None:
    world = World()
    world.add(1, 3)
    world.begin()
    with pytest.raises(AssertionError):
        world.scheduler.plan(1.0)


def test_stats_count_ends_by_reason() -> None:
    world = World()
    world.add(1, 3, new=1)
    world.add(2, 3, new=5)
    world.add(3, 3, new=5)
    world.step()
    world.scheduler.finish(2)
    stats = world.scheduler.stats()
    assert (stats["num_running"], stats["num_waiting"]) == (1, 0)
    assert (stats["num_finished_length"], stats["num_finished_abort"], stats["num_finished_stop"]) == (1, 1, 0)
