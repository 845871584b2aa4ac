"""A small model guesses for all sequences together, over a cache of its own; here it says the next number."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.optimizers.speculation.draft_model import PATIENCE, ModelDrafter
from penstock.optimizers.speculation.drafter import NUM_KINDS, Ask, Draft
from penstock.step import StepPlan
from tests.unit.optimizers.speculation.guessing import HOPEFUL, propose, sequence


class Small:
    """Plays the small model, `sure` of what it says; `runs` holds the rows of each pass, as (sequence, start, end)."""

    def __init__(self, sure: float = 0.99) -> None:
        self.sure = sure
        self.runs: list[list[tuple[int, int, int]]] = []
        self.blocks: dict[int, list[int]] = {}

    def __call__(self, plan: StepPlan) -> list[tuple[int, float] | None]:
        self.runs.append([(row.seq_id, row.start, row.end) for row in plan.rows])
        self.blocks |= {row.seq_id: list(row.blocks) for row in plan.rows}
        held = [block for blocks in self.blocks.values() for block in blocks]
        assert all(len(row.blocks) * 4 >= row.end for row in plan.rows)
        assert len({id(row.blocks) for row in plan.rows}) == len(plan.rows)
        assert all(0 <= block < 8 for block in held)
        return [(row.tokens[row.end - 1] + 1, self.sure) if row.samples else None for row in plan.rows]


def drafter_of(small: Small, **options: Any) -> ModelDrafter:
    """8 blocks of 4 tokens, unless told otherwise."""
    return ModelDrafter(small, **{"max_length": 100, "num_blocks": 8, "block_size": 4, "max_tokens": 64} | options)


def test_guesses_are_made_for_all_sequences_together() -> None:
    small = Small()
    first, second = sequence(0, [1, 2, 3]), sequence(1, [10, 11])
    drafts = drafter_of(small).propose([Ask(first, 3, HOPEFUL), Ask(second, 2, HOPEFUL)])
    assert [draft.tokens for draft in drafts] == [(4, 5, 6), (12, 13)]
    assert small.runs == [[(0, 0, 3), (1, 0, 2)], [(0, 3, 4), (1, 2, 3)], [(0, 4, 5)]]


def test_guesses_that_came_true_are_not_computed_again() -> None:
    small, seq = Small(), sequence(0, [1, 2, 3])
    drafter = drafter_of(small)
    propose(drafter, seq)
    seq.tokens.extend([4, 5, 9])
    assert propose(drafter, seq, most=1).tokens == (10,)
    assert small.runs[-1] == [(0, 5, 6)]


@pytest.mark.parametrize("said", [[8], [4, 9], [4, 5, 6, 7, 20, 21]])
def test_what_came_otherwise_is_computed_from_there_on(said: list[int]) -> None:
    small, seq = Small(), sequence(0, [1, 2, 3])
    drafter, right = drafter_of(small), {8: 3, 9: 4, 21: 6}
    propose(drafter, seq)
    assert small.runs[-1] == [(0, 5, 6)], "the last of four guesses never went through the model"
    seq.tokens.extend(said)
    assert propose(drafter, seq, most=1).tokens == (said[-1] + 1,)
    assert small.runs[-1] == [(0, right[said[-1]], 3 + len(said))]


def test_a_pass_that_turned_out_right_to_the_end_computes_its_newest_token_again() -> None:
    """The logits after it are wanted."""
    small, seq = Small(), sequence(0, [1, 2, 3])
    drafter = drafter_of(small)
    propose(drafter, seq, most=4)
    seq.tokens.extend([4, 5])
    assert propose(drafter, seq, most=1).tokens == (6,)
    assert small.runs[-1] == [(0, 4, 5)]


def test_how_sure_the_model_was_is_the_kind_of_a_guess() -> None:
    kinds = [propose(drafter_of(Small(sure)), sequence(0, [1]), most=1).kinds[0] for sure in (0.1, 0.5, 0.7, 0.99)]
    assert kinds == [0, 3, 4, NUM_KINDS - 1]


def test_a_draft_ends_where_the_next_guess_is_not_worth_its_making() -> None:
    draft = propose(drafter_of(Small()), sequence(0, [1]), most=20, least=0.75)
    assert len(draft.tokens) == 3, "0.9 and 0.81 are worth more; the third, with 0.729, still counts but ends it"


def test_a_long_text_is_read_in_pieces_before_anything_is_guessed() -> None:
    small, seq = Small(), sequence(0, range(10))
    drafter = drafter_of(small, max_tokens=4)
    assert [propose(drafter, seq, most=2).tokens for _ in range(3)] == [(), (), (10, 11)]
    assert small.runs == [[(0, 0, 4)], [(0, 4, 8)], [(0, 8, 10)], [(0, 10, 11)]]


def test_a_full_pass_leaves_the_last_sequences_out() -> None:
    small = Small()
    drafts = drafter_of(small, max_tokens=3).propose([Ask(sequence(number, [1, 2]), 1, HOPEFUL) for number in range(3)])
    assert drafts == [Draft((3,), (7,)), Draft(), Draft()]
    assert small.runs == [[(0, 0, 2), (1, 0, 1)]]


def test_a_text_that_soon_ends_is_not_worth_reading() -> None:
    small, prompt = Small(), list(range(2 * PATIENCE + 2))
    assert propose(drafter_of(small), sequence(0, prompt, new=2), most=1) == Draft()
    assert small.runs == []
    assert propose(drafter_of(small), sequence(0, prompt, new=3), most=1).tokens


def test_no_guess_lies_beyond_the_positions_of_the_model() -> None:
    drafter = drafter_of(Small(), max_length=8)
    assert propose(drafter, sequence(0, [1, 2, 3, 4]), most=4).tokens == (5, 6, 7, 8)
    assert propose(drafter, sequence(1, [1, 2, 3, 4]), most=5) == Draft()


def test_blocks_come_from_who_was_drafted_for_least_recently() -> None:
    small = Small()
    drafter, seqs = drafter_of(small, num_blocks=3), [sequence(number, [1, 2, 3, 4, 5]) for number in range(2)]
    assert propose(drafter, seqs[0], most=1).tokens == (6,)
    assert propose(drafter, seqs[1], most=1).tokens == (6,)
    assert (small.runs[-1], len(drafter.unused())) == ([(1, 0, 5)], 1)
    assert propose(drafter, seqs[0], most=1).tokens == (6,)
    assert small.runs[-1] == [(0, 0, 5)], "its blocks were given away"


def test_blocks_of_ended_sequences_go_before_those_of_others() -> None:
    small = Small()
    drafter, seqs = drafter_of(small, num_blocks=4), [sequence(number, [1, 2, 3, 4, 5]) for number in range(3)]
    propose(drafter, seqs[0], most=1)
    propose(drafter, seqs[1], most=1)
    drafter.forget(1)
    propose(drafter, seqs[2], most=1)
    seqs[0].tokens.append(6)
    propose(drafter, seqs[0], most=1)
    assert small.runs[-1] == [(0, 5, 6)], "it kept its blocks, although it was drafted for least recently"


def test_who_drafts_together_takes_no_blocks_from_each_other() -> None:
    small = Small()
    drafter, seqs = drafter_of(small, num_blocks=3), [sequence(number, [1, 2, 3, 4, 5]) for number in range(2)]
    drafts = drafter.propose([Ask(seq, 4, HOPEFUL) for seq in seqs])
    assert [draft.tokens for draft in drafts] == [(6, 7, 8, 9), ()]


def test_the_blocks_of_ended_sequences_are_free_again() -> None:
    drafter = drafter_of(Small())
    propose(drafter, sequence(0, range(20)))
    assert len(drafter.unused()) < 8
    drafter.forget(0)
    drafter.forget(77)
    assert drafter.unused() == [*range(8)]
