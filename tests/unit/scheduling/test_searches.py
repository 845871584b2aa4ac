"""The beams of a search in the scheduler: who waits, who shares, who ends with whom. 10 blocks of 4 tokens."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.errors import RequestTooLarge
from penstock.optimizers.beam_search import BeamSearch
from penstock.optimizers.tuning.tuner import initial_limits
from penstock.sampling import SamplingParams
from penstock.scheduling.searches import Beams
from penstock.sequence import FinishReason, Sequence, Status
from penstock.step import RowResult, TokenLogprobs
from tests.unit.scheduling.world import HIGH, World


def search(
    world: World, prompt: int | list[int], width: int = 2, *, first: int = 1, new: int = 6, **options: Any
) -> list[Sequence]:
    """The sequences of a search, numbered from `first` on; the first one is in the queue."""
    tokens = list(range(prompt)) if isinstance(prompt, int) else prompt
    params = SamplingParams(use_beam_search=True, best_of=width, temperature=0.0, max_tokens=new, **options)
    members: list[Sequence] = []
    for number in range(first, first + width):
        parent = members[0] if members else None
        fields: dict[str, Any] = {"request_id": "r", "params": params, "parent": parent, "arrival": first / 1000}
        members.append(Sequence(id=number, tokens=list(tokens), max_len=len(tokens) + new, **fields))
    world.scheduler.search(Beams(BeamSearch(params, new, frozenset()), members), 0.0)
    return members


def offers(**scores: float) -> RowResult:
    """Candidates by token: `t50=-1.0`."""
    return RowResult(candidates=tuple(TokenLogprobs(int(name[1:]), s, s) for name, s in scores.items()))


def test_a_prompt_is_computed_once_and_its_blocks_are_shared() -> None:
    world = World()
    one, two = search(world, 10)
    assert world.begin() == {1: (0, 10)}
    assert world.plan.rows[0].siblings == ()
    assert world.end({1: offers(t50=-1.0, t51=-2.0)}) == [], "nothing is told before the end"
    assert (one.tokens[10:], two.tokens[10:]) == ([50], [51])
    assert world.begin() == {1: (10, 11), 2: (10, 11)}
    assert (list(one.blocks), list(two.blocks), world.plan.copies) == ([0, 1, 2], [0, 1, 3], ((2, 3),))


def test_a_beam_takes_the_place_of_another_without_recomputing() -> None:
    world = World()
    one, two = search(world, 10)
    world.begin()
    world.end({1: offers(t50=-1.0, t51=-2.0)})
    world.begin()
    world.end({1: offers(t60=-3.0), 2: offers(t61=-0.1, t62=-0.2)})
    assert (one.tokens[10:], two.tokens[10:]) == ([51, 62], [51, 61])
    assert list(one.blocks) == list(two.blocks) == [0, 1, 3]
    assert world.begin() == {1: (11, 12), 2: (11, 12)}
    assert world.plan.num_tokens == 2
    assert len(world.plan.copies) == 1


def test_the_best_texts_end_the_sequences_in_order() -> None:
    world = World()
    one, two = search(world, 10, new=2)
    world.begin()
    world.end({1: offers(t50=-1.0, t51=-2.0)})
    world.begin()
    events = world.end({1: offers(t60=-3.0), 2: offers(t61=-0.1, t62=-0.2)})
    assert [(event.seq_id, event.tokens, event.reason) for event in events] == [
        (1, (51, 61), FinishReason.LENGTH),
        (2, (51, 62), FinishReason.LENGTH),
    ]
    assert [entry.sampled for entry in events[0].logprobs] == [-2.0, -0.1]
    assert (one.tokens[10:], two.tokens[10:]) == ([51, 61], [51, 62])
    assert world.cache.num_free_blocks == 10
    assert not world.scheduler.has_work
    assert world.scheduler.stats()["num_finished_length"] == 2


def test_beams_that_reported_leave_their_room_to_those_that_have_not() -> None:
    """One token a step: the second beam comes a step later, and until then the first one holds nothing."""
    world = World(max_num_batched_tokens=1)
    one, two = search(world, 3, new=3)
    for _ in range(2):
        world.step()
    world.begin()
    world.end({1: offers(t50=-1.0, t51=-2.0)})
    assert world.begin() == {1: (3, 4)}
    world.end({1: offers(t60=-1.0)})
    assert (one.status, len(one.blocks), two.status) == (Status.WAITING, 0, Status.WAITING)
    assert world.scheduler.num_waiting == 2
    while (planned := world.begin()).get(2) != (3, 4):
        assert list(planned) == [2]
        world.end()
    world.end({2: offers(t61=-5.0)})
    assert (one.tokens[3:], two.tokens[3:]) == ([50, 60], [51, 61])


def test_a_preempted_beam_is_waited_for() -> None:
    world = World()
    search(world, 10)
    world.begin()
    world.end({1: offers(t50=-1.0, t51=-2.0)})
    world.add(9, 24, new=3, priority=HIGH)
    done = []
    while world.scheduler.has_work:
        world.begin()
        candidates = offers(t60=-1.0, t61=-2.0)
        done += world.end({row.seq_id: candidates for row in world.plan.rows if row.samples and row.seq_id < 9})
    assert world.scheduler.stats()["num_preemptions"] > 0
    assert {event.seq_id: len(event.tokens) for event in done if event.reason and event.seq_id != 9} == {1: 6, 2: 6}
    assert world.cache.num_free_blocks == 10


@pytest.mark.parametrize("when", ["queued", "running", "in a step"])
def test_beams_end_together(when: str) -> None:
    world = World()
    search(world, 10)
    other = world.add(9, 5, new=3)
    if when != "queued":
        world.begin()
        world.end({1: offers(t50=-1.0, t51=-2.0)})
    if when == "in a step":
        world.begin()
    events = world.scheduler.finish(2)
    if when == "in a step":
        assert events == []
        events = world.end()
    ended = [event.seq_id for event in events if event.reason is FinishReason.ABORT]
    assert sorted(ended) == [1, 2]
    assert list(world.scheduler.sequences()) == [other]
    world.drain()
    assert world.cache.num_free_blocks == 10


def test_an_error_of_one_row_ends_the_search_and_nobody_else() -> None:
    world = World()
    search(world, 10)
    world.add(9, 5, new=3)
    world.begin()
    world.end({1: offers(t50=-1.0, t51=-2.0)})
    world.begin()
    error = RuntimeError("a processor failed")
    events = world.end({1: RowResult(error=error), 2: offers(t60=-1.0)})
    assert [(event.seq_id, event.error) for event in events if event.reason] == [(1, error), (2, error)]
    assert [seq.id for seq in world.scheduler.sequences()] == [9]


def test_a_failed_step_ends_the_beams_that_were_not_in_it_too() -> None:
    world = World(max_num_batched_tokens=1)
    search(world, 1)
    world.begin()
    world.end({1: offers(t50=-1.0, t51=-2.0)})
    world.begin()
    events = world.scheduler.fail(world.plan, RuntimeError("no memory"))
    assert sorted(event.seq_id for event in events) == [1, 2]
    assert not world.scheduler.has_work


def test_a_watch_that_fails_ends_its_search() -> None:
    class Broken:
        def after(self, token: int) -> Broken:
            raise RuntimeError("no text")

    world = World()
    params = SamplingParams(use_beam_search=True, best_of=2, temperature=0.0, max_tokens=4)
    fields: dict[str, Any] = {"request_id": "r", "params": params, "max_len": 7}
    members = [Sequence(id=i, tokens=[1, 2, 3], **fields) for i in (1, 2)]
    world.scheduler.search(Beams(BeamSearch(params, 4, frozenset(), Broken()), members), 0.0)
    world.begin()
    events = world.end({1: offers(t50=-1.0)})
    assert [(event.seq_id, str(event.error)) for event in events] == [(1, "no text"), (2, "no text")]


def test_drafts_are_not_offered_to_beams() -> None:
    world = World()
    search(world, 10)
    world.begin()
    world.end({1: offers(t50=-1.0, t51=-2.0)})
    world.begin()
    world.end({1: offers(t60=-1.0), 2: offers(t61=-1.0)})
    world.scheduler.offer(1, [1, 2])
    world.begin()
    assert all(row.draft == () for row in world.plan.rows)


def steps_of(world: World, limit: int = 100) -> tuple[int, int]:
    """Steps and tokens until nothing is left; every beam finds two continuations, and the two beams live on."""
    steps = tokens = 0
    while world.scheduler.has_work:
        world.begin()
        steps, tokens = steps + 1, tokens + world.plan.num_tokens
        assert steps < limit, "it never ends"
        results = {row.seq_id: offers(t60=-1.0, t61=-2.0) for row in world.plan.rows if row.samples and row.seq_id < 9}
        world.end(results)
    return steps, tokens


def test_a_search_that_runs_is_not_held_to_what_newcomers_are() -> None:
    """The tuner lets one sequence run: beams took turns, and each turn computed a beam anew."""
    world = World(target="latency")
    world.scheduler.limits.tuned = initial_limits(world.config)._replace(max_batch_size=1)
    search(world, 4, new=4)
    assert steps_of(world) == (4, 4 + 2 * 3), "the prompt, and three tokens of each beam"
    assert world.scheduler.stats()["num_preemptions"] == 0


def test_a_search_starts_when_there_are_rows_for_all_its_beams() -> None:
    world = World(max_batch_size=2)
    world.add(9, 3, new=3)
    world.step()
    search(world, 3, new=2)
    assert list(world.step()) == [9]
    assert list(world.step()) == [9]
    assert list(world.begin()) == [1]


def test_rows_of_beams_to_come_are_not_given_away() -> None:
    world = World(max_batch_size=3)
    search(world, 3, new=3)
    world.add(9, 3, new=3)
    world.add(10, 3, new=3)
    assert list(world.begin()) == [1, 9]
    world.end({1: offers(t50=-1.0, t51=-2.0)})
    assert sorted(world.begin()) == [1, 2, 9]


def test_rows_of_beams_to_come_are_counted_once() -> None:
    """Three beams: one runs, two are to come, and of five rows two are left for others."""
    world = World(max_batch_size=5)
    search(world, 3, width=3, new=3)
    for number in (9, 10, 11):
        world.add(number, 3, new=3)
    assert list(world.begin()) == [1, 9, 10]


def test_what_could_never_fit_is_refused() -> None:
    world = World()
    with pytest.raises(RequestTooLarge):
        search(world, 38, new=6)
    assert not world.scheduler.has_work
