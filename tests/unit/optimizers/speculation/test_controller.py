"""Drafts are as long as they pay, by measured acceptance rates and step times. No clock: times are arguments."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest

from penstock.optimizers.speculation.controller import SpeculationController
from penstock.optimizers.speculation.drafter import Draft
from penstock.sampling import SamplingParams
from penstock.sequence import Sequence
from penstock.step import Row, RowResult, StepPlan, StepResult
from tests.unit.optimizers.speculation.drafting import sequence

Cost = Callable[[int], float]  # seconds of a step by its tokens
LEVEL = 5


class World:
    """Sequences that decode together; `right` is the acceptance rate of draft tokens, `cost` what a step takes."""

    def __init__(
        self, rows: int, right: float, cost: Cost, *, max_tokens: int = 8, draft_s: float | None = None
    ) -> None:
        self.controller = SpeculationController(costly=draft_s is not None)
        self.seqs = [sequence(number, [1, 2, 3], max_tokens=100_000) for number in range(rows)]
        self.right, self.cost, self.max_tokens, self.draft_s = right, cost, max_tokens, draft_s
        self.rng = random.Random(rows)
        self.seconds, self.plain_s, self.asked = 0.0, 0.0, 0
        self.asked_for: Counter[int] = Counter()

    def step(self) -> list[int]:
        """One step; how many draft tokens each sequence was offered."""
        rows = len(self.seqs)
        is_measured = self.controller.allows_step(rows)
        requests = self.controller.requests(self.seqs, len(self.seqs), self.max_tokens) if is_measured else []
        self.asked += len(requests)
        self.asked_for.update(request.seq.id for request in requests)
        drafts = [Draft((7,) * request.max_tokens, (LEVEL,) * request.max_tokens) for request in requests]
        if requests and self.draft_s is not None:
            self.controller.record_drafting(rows, self.max_tokens, self.draft_s * self.max_tokens)
            self.seconds += self.draft_s * self.max_tokens
        offered = dict(self.controller.choose(requests, drafts, rows)) if requests else {}
        plan = [self.row(seq, offered.get(seq.id, ())) for seq in self.seqs]
        results = [RowResult((7,) * (self.accepted(row) + 1)) for row in plan]
        for seq, result in zip(self.seqs, results, strict=True):
            seq.tokens.extend(result.tokens)
        step = StepPlan(tuple(plan))
        seconds = self.cost(step.num_tokens)
        if is_measured:
            self.controller.record_step(step, StepResult(tuple(results)), seconds)
        self.seconds += seconds
        self.plain_s += self.cost(rows) * sum(len(result.tokens) for result in results) / rows
        return [len(row.draft) for row in plan]

    def row(self, seq: Sequence, draft: tuple[int, ...]) -> Row:
        end = seq.length + len(draft)
        return Row(seq.id, seq.tokens, seq.length - 1, end, array("i"), True, seq.params, 3, draft=draft)

    def accepted(self, row: Row) -> int:
        count = 0
        while count < len(row.draft) and self.rng.random() < self.right:
            count += 1
        return count

    def run(self, steps: int) -> list[list[int]]:
        return [self.step() for _ in range(steps)]

    @property
    def speedup(self) -> float:
        """Over plain decoding of the same tokens."""
        return self.plain_s / self.seconds


def mean(steps: list[list[int]]) -> float:
    return sum(map(sum, steps)) / sum(map(len, steps))


def flat(tokens: int) -> float:
    """A device that waits for memory: a few tokens more cost next to nothing."""
    return 0.027 + 0.0009 * (tokens - 1)


def steep(tokens: int) -> float:
    """A device that computes all the time."""
    return 0.001 + 0.002 * tokens


def test_where_tokens_are_nearly_free_good_drafts_are_offered_in_full() -> None:
    world = World(1, right=0.95, cost=flat)
    assert mean(world.run(100)[20:]) > 7
    assert world.speedup > 3


def test_drafts_grow_shorter_with_lower_acceptance() -> None:
    lengths = [mean(World(1, right=right, cost=flat).run(400)[100:]) for right in (0.1, 0.5, 0.8, 0.97)]
    assert lengths == sorted(lengths)
    assert lengths[0] < 2 < 6 < lengths[-1]


def test_a_full_batch_gets_shorter_drafts_than_a_lone_stream() -> None:
    def machine(tokens: int) -> float:
        return 0.025 + max(0.0, 0.0012 * (tokens - 8))

    lengths = [mean(World(rows, right=0.7, cost=machine).run(200)[50:]) for rows in (1, 4, 32)]
    assert lengths[0] > lengths[1] > lengths[2]


@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("right", [0.0, 0.2, 0.4])
def test_where_drafts_do_not_pay_next_to_nothing_is_lost(rows: int, right: float) -> None:
    world = World(rows, right=right, cost=steep)
    world.run(1000)
    assert world.speedup > 0.98


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_a_draft_model_that_does_not_pay_is_hardly_run(rows: int) -> None:
    world = World(rows, right=0.3, cost=flat, draft_s=0.020)
    world.run(6000)
    assert world.asked / rows < 6000 * 0.05
    assert world.speedup > 0.97


def test_a_draft_model_is_told_which_tokens_pay_for_being_drafted() -> None:
    """One more token costs 0.9 ms and the draft model takes 2.7 ms for it: a plain step makes a token in 27 ms."""
    world = World(1, right=0.9, cost=flat, draft_s=0.0027)
    world.run(100)
    (request,) = world.controller.requests(world.seqs, len(world.seqs), 8)
    assert request.min_acceptance == pytest.approx(0.7 * (0.9 + 2.7) / 27, rel=0.02)


def test_a_draft_model_is_run_for_sequences_that_accept_its_drafts() -> None:
    world = World(2, right=0.0, cost=flat, draft_s=0.002)
    world.accepted = lambda row: len(row.draft) if row.seq_id == 1 else 0  # type: ignore[method-assign]
    world.run(600)
    assert world.asked_for[1] > 500
    assert world.asked_for[0] < 40


def test_a_draft_model_that_proposes_nothing_has_cost_its_time_all_the_same() -> None:
    """Each time costs 0.8 tokens; after more than two lost, the sequence is paused for 16 steps."""
    world, asked = World(1, right=0.0, cost=flat), 0
    world.controller = SpeculationController(costly=True)
    (seq,) = world.seqs
    for _ in range(15):
        if requests := world.controller.requests([seq], 1, 8):
            asked += 1
            world.controller.record_drafting(1, 8, 8 * 0.0027)
            assert world.controller.choose(requests, [Draft()], 1) == []
        step = StepPlan((world.row(seq, ()),))
        seq.tokens.append(7)
        world.controller.record_step(step, StepResult((RowResult((7,)),)), flat(1))
    assert asked == 3


def test_one_slow_drafting_changes_the_estimate_by_a_tenth() -> None:
    world = World(1, right=0.9, cost=flat, draft_s=0.0027)
    world.run(100)
    world.controller.record_drafting(1, 8, 8 * 0.027)
    (request,) = world.controller.requests(world.seqs, len(world.seqs), 8)
    assert request.min_acceptance == pytest.approx(0.7 * (0.9 + 2.7 + 2.43) / 27, rel=0.02)


def test_a_draft_model_that_pays_goes_on() -> None:
    world = World(1, right=0.8, cost=flat, draft_s=0.002)
    world.run(500)
    assert world.speedup > 1.5


def test_it_starts_again_when_drafts_become_right() -> None:
    world = World(4, right=0.0, cost=steep)
    world.run(1000)
    assert mean(world.run(50)) < 0.2
    world.right, world.cost = 0.97, flat
    world.run(700)
    assert mean(world.run(50)) > 4


def test_each_request_gets_what_its_own_drafts_are_worth() -> None:
    world = World(2, right=0.0, cost=steep)
    world.accepted = lambda row: len(row.draft) if row.seq_id == 1 else 0  # type: ignore[method-assign]
    bad, good = zip(*world.run(300)[100:], strict=True)
    assert sum(good) / len(good) > 4
    assert sum(bad) / len(bad) < 0.5


def test_a_request_limits_the_length_of_its_drafts() -> None:
    world = World(3, right=1.0, cost=flat)
    lengths = (None, 0, 2)
    world.seqs = [
        sequence(number, [1, 2], params=SamplingParams(max_tokens=900, speculation_length=length), max_tokens=900)
        for number, length in enumerate(lengths)
    ]
    lengths_by_step = world.run(40)[20:]
    assert [max(column) for column in zip(*lengths_by_step, strict=True)] == [8, 0, 2]


@pytest.mark.parametrize(("cost", "tokens"), [(steep, 4), (flat, 1)])
def test_after_a_draft_of_no_worth_a_sequence_is_paused_where_a_token_costs_much(cost: Cost, tokens: int) -> None:
    """For four tokens. Where a draft token costs next to nothing, there is no pause."""
    world = World(1, right=0.0, cost=cost)
    world.run(10)
    world.seqs = [sequence(7, [1, 2, 3], max_tokens=1000)]
    missed_at, gaps = None, []
    for _ in range(25):
        before, length = world.asked, world.seqs[0].length
        (offered,) = world.step()
        if world.asked > before:
            gaps += [length - missed_at] if missed_at is not None else []
            missed_at = None if offered else length
    assert set(gaps) == {tokens}


def test_after_eight_misses_a_sequence_is_drafted_for_half_as_often() -> None:
    world = World(1, right=0.0, cost=steep)
    world.run(10)
    seq = world.seqs[0] = sequence(7, [1, 2, 3], max_tokens=1000)
    asked_at = []
    for _ in range(60):
        if requests := world.controller.requests([seq], 1, 8):
            asked_at.append(seq.length)
            assert world.controller.choose(requests, [Draft((7,), (0,))], 1) == []
        step = StepPlan((world.row(seq, ()),))
        seq.tokens.append(9)
        world.controller.record_step(step, StepResult((RowResult((9,)),)), steep(1))
    gaps = [later - sooner for sooner, later in pairwise(asked_at)]
    assert gaps[:9] == [*7 * [4], 8, 8]


def test_the_number_of_sequences_may_change_with_every_step() -> None:
    world, num_requests = World(8, right=0.5, cost=flat), 0
    for number in range(100):
        seqs = world.seqs[: (5, 8)[number % 2]]
        requests = world.controller.requests(seqs, len(seqs), 8)
        num_requests += len(requests)
        assert not requests or world.controller.choose(requests, [Draft()] * len(requests), len(seqs)) == []
        step = StepPlan(tuple(world.row(seq, ()) for seq in seqs))
        for seq in seqs:
            seq.tokens.append(7)
        world.controller.record_step(step, StepResult((RowResult((7,)),) * len(seqs)), flat(len(seqs)))
    assert num_requests > 300


def test_no_draft_goes_beyond_the_last_token() -> None:
    world = World(2, right=1.0, cost=flat)
    world.run(3)
    world.seqs = [sequence(0, [1], [2, 3], max_tokens=5), sequence(1, [1], [2, 3, 4], max_tokens=4)]
    requests = world.controller.requests(world.seqs, len(world.seqs), 8)
    assert [(request.seq.id, request.max_tokens) for request in requests] == [(0, 2)], "the step adds one of its own"


def test_plain_steps_are_known_before_anything_is_compared_with_them() -> None:
    world = World(1, right=1.0, cost=flat)
    assert sum(world.step()) == 0
    assert sum(world.step()) > 0


def test_steps_with_a_prefill_are_not_measured() -> None:
    world = World(1, right=1.0, cost=flat)
    world.run(20)
    seq = world.seqs[0]
    slow = StepPlan((world.row(seq, ()), Row(9, [1] * 500, 0, 400, array("i"), False, seq.params, 500)))
    for _ in range(50):
        world.controller.record_step(slow, StepResult((RowResult((7,)), RowResult())), 5.0)
    assert mean(world.run(20)) > 7


def test_what_ended_is_forgotten() -> None:
    world = World(3, right=1.0, cost=flat)
    world.run(5)
    assert world.controller.num_sequences == 3
    assert sorted(world.controller.forget_all_but([1, 7])) == [0, 2]
    assert world.controller.num_sequences == 1
    world.step()


def test_a_clock_that_stands_still_does_no_harm() -> None:
    world = World(2, right=1.0, cost=lambda tokens: 0.0)
    assert world.run(3) == [[0, 0]] * 3
