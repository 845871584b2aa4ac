"""Samples of one prompt: computed once, drawn from the same logits, blocks shared until somebody writes."""

from __future__ import annotations

import pytest

from penstock.sampling import SamplingParams
from penstock.sequence import FinishReason, Sequence, Status
from penstock.step import RowResult
from tests.unit.scheduling.world import HIGH, World


def family(world: World, prompt: list[int], count: int = 3, *, first: int = 1, new: int = 4) -> list[Sequence]:
    """Samples of one prompt, numbered from `first` on."""
    sequences: list[Sequence] = []
    for index in range(count):
        parent = sequences[0] if sequences else None
        fields = {"request_id": f"r{first}", "parent": parent, "sample_index": index, "now": first / 1000}
        sequences.append(world.add(first + index, prompt, new, **fields))
    return sequences


def test_siblings_draw_from_the_logits_of_the_first() -> None:
    world = World()
    one, two, three = family(world, [*range(10)])
    assert world.begin() == {1: (0, 10)}
    assert [(row.seq_id, row.sample_index, row.start, row.end) for row in world.plan.rows[0].siblings] == [
        (2, 1, 10, 10),
        (3, 2, 10, 10),
    ]
    events = world.end({1: (50,), 2: (51,), 3: (52,)})
    assert [(event.seq_id, event.tokens) for event in events] == [(1, (50,)), (2, (51,)), (3, (52,))]
    assert [seq.tokens[-1] for seq in (one, two, three)] == [50, 51, 52]


def test_a_prompt_is_computed_once_however_many_samples() -> None:
    """8 samples of 1,000 tokens: 1,000 tokens go through the model, and the prompt's 62 full blocks are there once."""
    world = World(100, 16, max_num_batched_tokens=512, max_batch_size=8)
    samples = family(world, [*range(1000)], 8, new=16)
    prefilled = 0
    while not samples[0].num_generated:
        world.begin()
        prefilled += world.plan.num_tokens
        world.end()
    assert prefilled == 1000
    world.begin()
    assert world.plan.num_tokens == 8, "everybody decodes"
    assert len(world.plan.copies) == 7, "the partly filled block"
    assert len({block for seq in samples for block in seq.blocks}) == 62 + 8
    while world.scheduler.has_work:
        assert world.plan.num_tokens == 8
        used = 100 - world.cache.num_free_blocks
        world.end()
        world.begin()
    assert used == 62 + 2 * 8, "the same for one sample is 64"


@pytest.mark.parametrize("caching", [True, False])
def test_siblings_share_every_block_of_the_prompt_until_they_write(caching: bool) -> None:
    world = World(caching=caching)
    one, two, _ = family(world, [*range(10)])
    world.step()
    assert world.begin() == {1: (10, 11), 2: (10, 11), 3: (10, 11)}
    assert world.plan.copies == ((2, 3), (2, 4))
    assert (list(one.blocks), list(two.blocks)) == ([0, 1, 2], [0, 1, 3])


def test_siblings_wait_through_every_chunk_of_the_prompt() -> None:
    world = World(max_num_batched_tokens=4)
    family(world, [*range(10)])
    assert world.step() == {1: (0, 4)}
    assert (world.scheduler.num_running, world.scheduler.num_waiting) == (1, 2)
    assert world.step() == {1: (4, 8)}
    assert world.step() == {1: (8, 10)}
    assert list(world.step()) == [1, 2, 3]


def test_siblings_without_a_place_wait_with_their_first_token() -> None:
    world = World(max_batch_size=2)
    _, _, third = family(world, [*range(10)])
    world.step()
    assert list(world.step()) == [1, 2]
    assert (third.status, third.num_generated) == (Status.WAITING, 1)
    assert world.drain() == [[1, 2], [1, 2], [3], [3], [3]]


def test_a_sibling_that_ends_with_its_first_token_never_runs() -> None:
    world = World()
    _, two, _ = family(world, [*range(10)], new=4)
    world.begin()
    world.end({2: RowResult(error=RuntimeError("its processor failed"))})
    assert (two.status, two.reason) == (Status.FINISHED, FinishReason.ERROR)
    assert list(world.step()) == [1, 3]


def test_a_sibling_that_was_aborted_while_its_token_was_drawn_is_gone() -> None:
    world = World()
    family(world, [*range(10)])
    world.begin()
    assert [event.seq_id for event in world.scheduler.finish(2)] == [2], "no plan holds anything of it"
    assert [event.seq_id for event in world.end()] == [1, 3]


def test_siblings_run_by_themselves_when_the_first_one_ends_before_it_drew() -> None:
    for ending in ("abort", "fail", "abort in mid-step"):
        world = World()
        family(world, [*range(10)])
        if ending == "abort":
            world.scheduler.finish(1)
        else:
            world.begin()
            if ending == "fail":
                world.scheduler.fail(world.plan, RuntimeError("out of memory"))
            else:
                world.scheduler.finish(1)
                world.end()
        assert len(world.drain()) <= 5
        assert world.cache.num_free_blocks == 10


def test_a_preempted_first_sample_draws_for_its_siblings_later() -> None:
    world = World(max_num_batched_tokens=8)
    one, two, _ = family(world, [*range(20)])
    world.step()
    world.add(9, 30, new=4, priority=HIGH)
    world.step()
    assert (one.status, one.computed) == (Status.WAITING, 0)
    assert two.num_generated == 0
    steps = world.drain()
    assert [1, 2, 3] in steps
    assert world.cache.num_free_blocks == 10


def test_a_preempted_sibling_comes_back_with_its_own_tokens() -> None:
    world = World()
    one, two, three = family(world, [*range(10)], new=20)
    world.begin()
    world.end({1: (50,), 2: (51,), 3: (52,)})
    for _ in range(19):
        tokens = {seq.id: (seq.tokens[-1],) for seq in (one, two, three)}
        world.begin()
        world.end({row.seq_id: tokens[row.seq_id] for row in world.plan.rows})
    while world.scheduler.has_work:
        world.begin()
        world.end({row.seq_id: (row.tokens[-1],) for row in world.plan.rows})
    assert world.scheduler.stats()["num_preemptions"] > 0
    assert [set(seq.tokens[10:]) for seq in (one, two, three)] == [{50}, {51}, {52}]


def test_a_sibling_that_wants_the_prompt_scored_computes_it() -> None:
    world = World()
    params = SamplingParams(max_tokens=4, prompt_logprobs=0)
    first = world.add(1, [*range(10)], request_id="r", params=params)
    world.add(2, [*range(10)], request_id="r", params=params, parent=first)
    assert world.begin() == {1: (0, 10), 2: (0, 10)}


def test_a_late_sibling_shares_the_partial_block_by_copy() -> None:
    world = World()
    first = world.add(1, [*range(10)], request_id="r")
    world.step()
    late = world.add(2, [*range(10)], request_id="r", parent=first)
    assert world.begin() == {1: (10, 11), 2: (9, 10)}
    assert world.plan.copies == ((2, 3),)
    assert (list(first.blocks), list(late.blocks)) == ([0, 1, 2], [0, 1, 3])


def test_a_fork_shares_what_its_parent_generated_too() -> None:
    """It is a request of its own whose prompt is all that the parent has said."""
    world = World()
    parent = world.add(1, [*range(6)], new=9)
    for _ in range(4):
        world.step()
    assert (parent.length, parent.computed) == (10, 9)
    fork = world.add(2, list(parent.tokens), new=5, parent=parent)
    assert world.begin() == {1: (9, 10), 2: (9, 10)}
    assert (list(parent.blocks), list(fork.blocks)) == ([0, 1, 2], [0, 1, 3])
    assert world.plan.copies == ((2, 3),)


def test_drafts_are_not_offered_to_who_draws_for_others() -> None:
    world = World(max_num_batched_tokens=9)
    family(world, [*range(10)])
    world.step()
    world.scheduler.offer(1, [1, 2])
    world.begin()
    assert world.plan.rows[0].draft == ()
    assert len(world.plan.rows[0].siblings) == 2
