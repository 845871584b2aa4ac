"""From blocks to slots, by hand: blocks of 4 tokens."""

from __future__ import annotations

from array import array

import torch

from penstock.models.layout import StepLayout, num_draws_of
from penstock.sampling import SamplingParams
from penstock.step import Row


def row(tokens: list[int], start: int, end: int, blocks: list[int], **fields: object) -> Row:
    params = fields.pop("params", SamplingParams())
    samples = end >= len(tokens)
    return Row(0, tokens, start, end, array("i", blocks), samples, params, len(tokens), **fields)  # type: ignore[arg-type]


def layout(*rows: Row) -> StepLayout:
    return StepLayout.of(rows, 4, torch.device("cpu"))


def test_tokens_positions_and_slots_follow_the_block_table() -> None:
    result = layout(row([7, 8, 9, 10, 11, 12], 3, 6, [5, 2]), row([1, 2], 1, 2, [0]))
    assert result.input_ids.tolist() == [10, 11, 12, 2]
    assert result.positions.tolist() == [3, 4, 5, 1]
    assert result.write_slots.tolist() == [23, 8, 9, 1]


def test_logits_are_needed_after_the_newest_token_only() -> None:
    chunk, final_chunk = row([1, 2, 3, 4, 5, 6], 0, 3, [0, 1]), row([1, 2, 3], 0, 3, [2])
    assert layout(chunk, final_chunk).logit_indices.tolist() == [5]
    assert (num_draws_of(chunk), num_draws_of(final_chunk)) == (0, 1)


def test_scores_need_the_logits_before_each_scored_token() -> None:
    scored = row([1, 2, 3, 4, 5, 6], 1, 5, [0, 1], scored=range(3, 6))
    result = layout(row([1], 0, 1, [3]), scored)
    assert result.logit_indices.tolist() == [0, 2, 3, 4]
    assert result.num_logits == [1, 3]


def test_logits_for_scores_come_before_those_for_draws() -> None:
    """A preempted sequence computes both its prompt, with scores, and its output."""
    both = row([1, 2, 3, 4, 5, 6], 0, 8, [0, 1], scored=range(1, 3), draft=(8, 9))
    assert layout(both).logit_indices.tolist() == [0, 1, 5, 6, 7]


def test_drafts_follow_the_tokens_and_need_logits_too() -> None:
    result = layout(row([1, 2, 3], 2, 5, [0, 1], draft=(8, 9)))
    assert result.input_ids.tolist() == [3, 8, 9]
    assert result.logit_indices.tolist() == [0, 1, 2]
