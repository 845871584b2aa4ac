"""What a step may take, by hand."""

from __future__ import annotations

from penstock.scheduling.planning import Budget


def test_prefill_leaves_a_token_for_every_decode() -> None:
    budget = Budget(tokens=10, rows=8, logit_rows=None, num_decoding=3)
    assert budget.grant(num_todo=100, num_without_logits=99) == 7
    budget.spend(tokens=7, logit_rows=0)
    assert not budget.is_open()
    assert budget.is_open(num_leaving=1)
    for _ in range(3):
        budget.release_reserved()
        assert budget.grant(num_todo=1, num_without_logits=0) == 1
        budget.spend(tokens=1, logit_rows=1)
    assert budget.grant(num_todo=1, num_without_logits=0) == 0


def test_drafts_take_only_what_is_not_held_back() -> None:
    budget = Budget(tokens=4, rows=8, logit_rows=None, num_decoding=2)
    budget.release_reserved()
    assert budget.grant(num_todo=6, num_without_logits=0) == 3


def test_rows_end_the_step() -> None:
    budget = Budget(tokens=10, rows=1, logit_rows=None, num_decoding=0)
    budget.spend(tokens=1, logit_rows=0)
    assert budget.grant(num_todo=1, num_without_logits=0) == 0
    assert not budget.is_open()


def test_logit_rows_bound_drafts_and_samples() -> None:
    budget = Budget(tokens=100, rows=8, logit_rows=3, num_decoding=0)
    assert budget.grant(num_todo=6, num_without_logits=0) == 3
    budget.spend(tokens=20, logit_rows=3)
    assert budget.grant(num_todo=20, num_without_logits=19) == 19, "all but the position that samples"
    assert budget.grant(num_todo=1, num_without_logits=0) == 0


def test_scores_take_half_of_the_logit_rows_and_one_at_least() -> None:
    budget = Budget(tokens=100, rows=8, logit_rows=6, num_decoding=0)
    assert budget.grant(num_todo=20, num_without_logits=10, scores=True) == 13
    budget.spend(tokens=12, logit_rows=2, scored_rows=2)
    assert budget.grant(num_todo=20, num_without_logits=0, scores=True) == 1
    budget.spend(tokens=1, logit_rows=1, scored_rows=1)
    assert budget.grant(num_todo=20, num_without_logits=4, scores=True) == 4
    assert budget.grant(num_todo=6, num_without_logits=0) == 3, "the other half is for samples"
    assert Budget(tokens=9, rows=8, logit_rows=1, num_decoding=0).grant(9, 0, scores=True) == 1


def test_more_decodes_than_tokens_are_served_in_turn() -> None:
    budget = Budget(tokens=2, rows=8, logit_rows=None, num_decoding=5)
    served = 0
    for _ in range(5):
        budget.release_reserved()
        tokens = budget.grant(num_todo=1, num_without_logits=0)
        if tokens:
            budget.spend(tokens, logit_rows=1)
        served += tokens
    assert served == 2


def left(budget: Budget) -> dict[str, int]:
    """What has not been spent."""
    return {name: getattr(budget, name) for name in Budget.__slots__}


def test_drawing_is_to_claim_to_be_granted_and_to_spend_one_token() -> None:
    limits = {"tokens": 3, "rows": 2, "logit_rows": 3, "num_decoding": 5}
    drawn, asked = Budget(**limits), Budget(**limits)
    for _ in range(2):
        assert drawn.spend_reserved()
        asked.release_reserved()
        asked.spend(asked.grant(num_todo=1, num_without_logits=0), logit_rows=1)
        assert left(drawn) == left(asked)
    assert not drawn.spend_reserved()
    assert drawn.rows == 0
