"""Drafts are as long as they pay, by what guesses and steps were measured to be worth. No clock: times are told."""

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
from tests.unit.optimizers.speculation.guessing import sequence

Cost = Callable[[int], float]  # seconds of a step by its tokens
KIND = 5


class World:
    """Sequences that decode together; `right` is the chance of each guess, `cost` what a step takes."""

    def __init__(self, rows: int, right: float, cost: Cost, *, most: int = 8, draft_s: float | None = None) -> None:
        self.controller = SpeculationController(costly=draft_s is not None)
        self.seqs = [sequence(number, [1, 2, 3], new=100_000) for number in range(rows)]
        self.right, self.cost, self.most, self.draft_s = right, cost, most, draft_s
        self.rng = random.Random(rows)
        self.seconds, self.plain_s, self.asked = 0.0, 0.0, 0
        self.asked_for: Counter[int] = Counter()

    def step(self) -> list[int]:
        """One step; how many guesses each sequence was offered."""
        rows = len(self.seqs)
        asks = self.controller.asks(self.seqs, self.most)
        self.asked += len(asks)
        self.asked_for.update(ask.seq.id for ask in asks)
        drafts = [Draft((7,) * ask.most, (KIND,) * ask.most) for ask in asks]
        if asks and self.draft_s is not None:
            self.controller.record_drafting(rows, self.most, self.draft_s * self.most)
            self.seconds += self.draft_s * self.most
        offered = dict(self.controller.choose(asks, drafts, rows)) if asks else {}
        plan = [self.row(seq, offered.get(seq.id, ())) for seq in self.seqs]
        results = [RowResult((7,) * (self.accepted(row) + 1)) for row in plan]
        for seq, result in zip(self.seqs, results, strict=True):
            seq.tokens.extend(result.tokens)
        step = StepPlan(tuple(plan))
        seconds = self.cost(step.num_tokens)
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


def test_where_tokens_are_nearly_free_good_guesses_are_all_taken() -> None:
    world = World(1, right=0.95, cost=flat)
    assert mean(world.run(100)[20:]) > 7
    assert world.speedup > 3


def test_drafts_grow_shorter_with_worse_guesses() -> None:
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
def test_where_guesses_do_not_pay_next_to_nothing_is_lost(rows: int, right: float) -> None:
    world = World(rows, right=right, cost=steep)
    world.run(1000)
    assert world.speedup > 0.98


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_a_draft_model_that_does_not_pay_is_hardly_run(rows: int) -> None:
    world = World(rows, right=0.3, cost=flat, draft_s=0.020)
    world.run(6000)
    assert world.asked / rows < 6000 * 0.05
    assert world.speedup > 0.97


def test_a_draft_model_is_told_which_guesses_pay_for_their_making() -> None:
    """One more token costs 0.9 ms and the draft model takes 2.7 ms for it: a plain step makes a token in 27 ms."""
    world = World(1, right=0.9, cost=flat, draft_s=0.0027)
    world.run(100)
    (ask,) = world.controller.asks(world.seqs, 8)
    assert ask.least == pytest.approx(0.7 * (0.9 + 2.7) / 27, rel=0.02)


def test_a_draft_model_is_run_for_those_that_it_guesses_right() -> None:
    world = World(2, right=0.0, cost=flat, draft_s=0.002)
    world.accepted = lambda row: len(row.draft) if row.seq_id == 1 else 0  # type: ignore[method-assign]
    world.run(600)
    assert world.asked_for[1] > 500
    assert world.asked_for[0] < 40


def test_a_draft_model_that_guesses_nothing_has_cost_its_time_all_the_same() -> None:
    """Each time costs 0.8 tokens; after more than two lost, the sequence is left alone for 16 steps."""
    world, asked = World(1, right=0.0, cost=flat), 0
    world.controller = SpeculationController(costly=True)
    (seq,) = world.seqs
    for _ in range(15):
        if asks := world.controller.asks([seq], 8):
            asked += 1
            world.controller.record_drafting(1, 8, 8 * 0.0027)
            assert world.controller.choose(asks, [Draft()], 1) == []
        step = StepPlan((world.row(seq, ()),))
        seq.tokens.append(7)
        world.controller.record_step(step, StepResult((RowResult((7,)),)), flat(1))
    assert asked == 3


def test_one_slow_drafting_is_believed_by_a_tenth() -> None:
    world = World(1, right=0.9, cost=flat, draft_s=0.0027)
    world.run(100)
    world.controller.record_drafting(1, 8, 8 * 0.027)
    (ask,) = world.controller.asks(world.seqs, 8)
    assert ask.least == pytest.approx(0.7 * (0.9 + 2.7 + 2.43) / 27, rel=0.02)


def test_a_draft_model_that_pays_goes_on() -> None:
    world = World(1, right=0.8, cost=flat, draft_s=0.002)
    world.run(500)
    assert world.speedup > 1.5


def test_it_begins_again_when_guesses_become_right() -> None:
    world = World(4, right=0.0, cost=steep)
    world.run(1000)
    assert mean(world.run(50)) < 0.2
    world.right, world.cost = 0.97, flat
    world.run(700)
    assert mean(world.run(50)) > 4


def test_each_request_gets_what_its_own_guesses_are_worth() -> None:
    world = World(2, right=0.0, cost=steep)
    world.accepted = lambda row: len(row.draft) if row.seq_id == 1 else 0  # type: ignore[method-assign]
    bad, good = zip(*world.run(300)[100:], strict=True)
    assert sum(good) / len(good) > 4
    assert sum(bad) / len(bad) < 0.5


def test_a_request_says_how_many_guesses_it_wants_at_most() -> None:
    world = World(3, right=1.0, cost=flat)
    lengths = (None, 0, 2)
    world.seqs = [
        sequence(number, [1, 2], params=SamplingParams(max_tokens=900, speculation_length=length), new=900)
        for number, length in enumerate(lengths)
    ]
    found = world.run(40)[20:]
    assert [max(column) for column in zip(*found, strict=True)] == [8, 0, 2]


@pytest.mark.parametrize(("cost", "tokens"), [(steep, 4), (flat, 1)])
def test_after_guesses_that_were_worth_nothing_nobody_asks_for_a_while_where_a_token_costs_much(
    cost: Cost, tokens: int
) -> None:
    """For four tokens. Where a guess costs next to nothing, the very next token is asked for."""
    world = World(1, right=0.0, cost=cost)
    world.run(10)
    world.seqs = [sequence(7, [1, 2, 3], new=1000)]
    in_vain_at, gaps = None, []
    for _ in range(25):
        before, length = world.asked, world.seqs[0].length
        (offered,) = world.step()
        if world.asked > before:
            gaps += [length - in_vain_at] if in_vain_at is not None else []
            in_vain_at = None if offered else length
    assert set(gaps) == {tokens}


def test_who_was_asked_in_vain_eight_times_is_asked_half_as_often() -> None:
    world = World(1, right=0.0, cost=steep)
    world.run(10)
    seq = world.seqs[0] = sequence(7, [1, 2, 3], new=1000)
    asked_at = []
    for _ in range(60):
        if asks := world.controller.asks([seq], 8):
            asked_at.append(seq.length)
            assert world.controller.choose(asks, [Draft((7,), (0,))], 1) == []
        step = StepPlan((world.row(seq, ()),))
        seq.tokens.append(9)
        world.controller.record_step(step, StepResult((RowResult((9,)),)), steep(1))
    gaps = [later - sooner for sooner, later in pairwise(asked_at)]
    assert gaps[:9] == [*7 * [4], 8, 8]


def test_the_number_of_sequences_may_change_with_every_step() -> None:
    world, num_asks = World(8, right=0.5, cost=flat), 0
    for number in range(100):
        seqs = world.seqs[: (5, 8)[number % 2]]
        asks = world.controller.asks(seqs, 8)
        num_asks += len(asks)
        assert not asks or world.controller.choose(asks, [Draft()] * len(asks), len(seqs)) == []
        step = StepPlan(tuple(world.row(seq, ()) for seq in seqs))
        for seq in seqs:
            seq.tokens.append(7)
        world.controller.record_step(step, StepResult((RowResult((7,)),) * len(seqs)), flat(len(seqs)))
    assert num_asks > 300


def test_no_guess_goes_beyond_the_last_token() -> None:
    world = World(2, right=1.0, cost=flat)
    world.run(3)
    world.seqs = [sequence(0, [1], [2, 3], new=5), sequence(1, [1], [2, 3, 4], new=4)]
    asks = world.controller.asks(world.seqs, 8)
    assert [(ask.seq.id, ask.most) for ask in asks] == [(0, 2)], "the step adds one of its own"


def test_plain_steps_are_known_before_anything_is_compared_with_them() -> None:
    world = World(1, right=1.0, cost=flat)
    assert sum(world.step()) == 0
    assert sum(world.step()) > 0


def test_steps_with_a_prefill_teach_nothing_about_steps() -> None:
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
    assert world.controller.num_known == 3
    assert sorted(world.controller.forget_all_but([1, 7])) == [0, 2]
    assert world.controller.num_known == 1
    world.step()


def test_a_clock_that_stands_still_does_no_harm() -> None:
    world = World(2, right=1.0, cost=lambda tokens: 0.0)
    assert world.run(3) == [[0, 0]] * 3
