"""A draft model drafts for all sequences together, over a cache of its own; here it predicts the next number."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.optimizers.speculation.draft_model import MAX_LAG, ModelDrafter
from penstock.optimizers.speculation.drafter import NUM_CONFIDENCE_LEVELS, Draft, DraftRequest
from penstock.step import StepPlan
from tests.unit.optimizers.speculation.drafting import HIGH_RATES, propose, sequence


class FakeDraftModel:
    """A draft model that gives every token `probability`; `runs` has the rows of each pass.

    A row is (sequence, start, end).
    """

    def __init__(self, probability: float = 0.99) -> None:
        self.probability = probability
        self.runs: list[list[tuple[int, int, int]]] = []
        self.blocks: dict[int, list[int]] = {}

    def __call__(self, plan: StepPlan) -> list[tuple[int, float] | None]:
        self.runs.append([(row.seq_id, row.start, row.end) for row in plan.rows])
        self.blocks |= {row.seq_id: list(row.blocks) for row in plan.rows}
        used = [block for blocks in self.blocks.values() for block in blocks]
        assert all(len(row.blocks) * 4 >= row.end for row in plan.rows)
        assert len({id(row.blocks) for row in plan.rows}) == len(plan.rows)
        assert all(0 <= block < 8 for block in used)
        return [(row.tokens[row.end - 1] + 1, self.probability) if row.samples else None for row in plan.rows]


def drafter_of(model: FakeDraftModel, **options: Any) -> ModelDrafter:
    """8 blocks of 4 tokens, unless told otherwise."""
    return ModelDrafter(model, **{"max_length": 100, "num_blocks": 8, "block_size": 4, "max_tokens": 64} | options)


def test_all_sequences_are_drafted_for_together() -> None:
    model = FakeDraftModel()
    first, second = sequence(0, [1, 2, 3]), sequence(1, [10, 11])
    drafts = drafter_of(model).propose([DraftRequest(first, 3, HIGH_RATES), DraftRequest(second, 2, HIGH_RATES)])
    assert [draft.tokens for draft in drafts] == [(4, 5, 6), (12, 13)]
    assert model.runs == [[(0, 0, 3), (1, 0, 2)], [(0, 3, 4), (1, 2, 3)], [(0, 4, 5)]]


def test_accepted_draft_tokens_are_not_computed_again() -> None:
    model, seq = FakeDraftModel(), sequence(0, [1, 2, 3])
    drafter = drafter_of(model)
    propose(drafter, seq)
    seq.tokens.extend([4, 5, 9])
    assert propose(drafter, seq, max_tokens=1).tokens == (10,)
    assert model.runs[-1] == [(0, 5, 6)]


@pytest.mark.parametrize("output", [[8], [4, 9], [4, 5, 6, 7, 20, 21]])
def test_after_a_rejected_draft_token_the_rest_is_computed_again(output: list[int]) -> None:
    model, seq = FakeDraftModel(), sequence(0, [1, 2, 3])
    drafter, right = drafter_of(model), {8: 3, 9: 4, 21: 6}
    propose(drafter, seq)
    assert model.runs[-1] == [(0, 5, 6)], "the last of four draft tokens never went through the model"
    seq.tokens.extend(output)
    assert propose(drafter, seq, max_tokens=1).tokens == (output[-1] + 1,)
    assert model.runs[-1] == [(0, right[output[-1]], 3 + len(output))]


def test_a_fully_accepted_draft_computes_its_newest_token_again() -> None:
    """The logits after it are wanted."""
    model, seq = FakeDraftModel(), sequence(0, [1, 2, 3])
    drafter = drafter_of(model)
    propose(drafter, seq, max_tokens=4)
    seq.tokens.extend([4, 5])
    assert propose(drafter, seq, max_tokens=1).tokens == (6,)
    assert model.runs[-1] == [(0, 4, 5)]


def test_probability_decides_the_confidence_level() -> None:
    kinds = [
        propose(drafter_of(FakeDraftModel(probability)), sequence(0, [1]), max_tokens=1).confidences[0]
        for probability in (0.1, 0.5, 0.7, 0.99)
    ]
    assert kinds == [0, 3, 4, NUM_CONFIDENCE_LEVELS - 1]


def test_a_draft_ends_where_the_next_token_is_not_worth_drafting() -> None:
    draft = propose(drafter_of(FakeDraftModel()), sequence(0, [1]), max_tokens=20, min_acceptance=0.75)
    assert len(draft.tokens) == 3, "0.9 and 0.81 are worth more; the third, with 0.729, still counts but ends it"


def test_a_long_text_is_prefilled_in_chunks_before_anything_is_drafted() -> None:
    model, seq = FakeDraftModel(), sequence(0, range(10))
    drafter = drafter_of(model, max_tokens=4)
    assert [propose(drafter, seq, max_tokens=2).tokens for _ in range(3)] == [(), (), (10, 11)]
    assert model.runs == [[(0, 0, 4)], [(0, 4, 8)], [(0, 8, 10)], [(0, 10, 11)]]


def test_a_full_pass_leaves_the_last_sequences_out() -> None:
    model = FakeDraftModel()
    drafts = drafter_of(model, max_tokens=3).propose(
        [DraftRequest(sequence(number, [1, 2]), 1, HIGH_RATES) for number in range(3)]
    )
    assert drafts == [Draft((3,), (7,)), Draft(), Draft()]
    assert model.runs == [[(0, 0, 2), (1, 0, 1)]]


def test_a_sequence_that_soon_ends_is_not_worth_prefilling() -> None:
    model, prompt = FakeDraftModel(), list(range(2 * MAX_LAG + 2))
    assert propose(drafter_of(model), sequence(0, prompt, max_tokens=2), max_tokens=1) == Draft()
    assert model.runs == []
    assert propose(drafter_of(model), sequence(0, prompt, max_tokens=3), max_tokens=1).tokens


def test_no_draft_exceeds_the_positions_of_the_model() -> None:
    drafter = drafter_of(FakeDraftModel(), max_length=8)
    assert propose(drafter, sequence(0, [1, 2, 3, 4]), max_tokens=4).tokens == (5, 6, 7, 8)
    assert propose(drafter, sequence(1, [1, 2, 3, 4]), max_tokens=5) == Draft()


def test_blocks_come_from_the_sequence_drafted_for_least_recently() -> None:
    model = FakeDraftModel()
    drafter, seqs = drafter_of(model, num_blocks=3), [sequence(number, [1, 2, 3, 4, 5]) for number in range(2)]
    assert propose(drafter, seqs[0], max_tokens=1).tokens == (6,)
    assert propose(drafter, seqs[1], max_tokens=1).tokens == (6,)
    assert (model.runs[-1], len(drafter.unused_blocks())) == ([(1, 0, 5)], 1)
    assert propose(drafter, seqs[0], max_tokens=1).tokens == (6,)
    assert model.runs[-1] == [(0, 0, 5)], "its blocks were given away"


def test_blocks_of_ended_sequences_go_before_those_of_others() -> None:
    model = FakeDraftModel()
    drafter, seqs = drafter_of(model, num_blocks=4), [sequence(number, [1, 2, 3, 4, 5]) for number in range(3)]
    propose(drafter, seqs[0], max_tokens=1)
    propose(drafter, seqs[1], max_tokens=1)
    drafter.forget(1)
    propose(drafter, seqs[2], max_tokens=1)
    seqs[0].tokens.append(6)
    propose(drafter, seqs[0], max_tokens=1)
    assert model.runs[-1] == [(0, 5, 6)], "it kept its blocks, although it was drafted for least recently"


def test_sequences_drafted_for_together_take_no_blocks_from_each_other() -> None:
    model = FakeDraftModel()
    drafter, seqs = drafter_of(model, num_blocks=3), [sequence(number, [1, 2, 3, 4, 5]) for number in range(2)]
    drafts = drafter.propose([DraftRequest(seq, 4, HIGH_RATES) for seq in seqs])
    assert [draft.tokens for draft in drafts] == [(6, 7, 8, 9), ()]


def test_the_blocks_of_ended_sequences_are_free_again() -> None:
    drafter = drafter_of(FakeDraftModel())
    propose(drafter, sequence(0, range(20)))
    assert len(drafter.unused_blocks()) < 8
    drafter.forget(0)
    drafter.forget(77)
    assert drafter.unused_blocks() == [*range(8)]
