"""From blocks to slots, by hand: blocks of 4 tokens."""

from __future__ import annotations

from array import array

import pytest
import torch

from penstock.models.layout import StepLayout, wanted_logits
from penstock.sampling import SamplingParams
from penstock.step import Row


def row(tokens: list[int], start: int, end: int, blocks: list[int], **fields: object) -> Row:
    params = fields.pop("params", SamplingParams())
    samples = end >= len(tokens)
    return Row(0, tokens, start, end, array("i", blocks), samples, params, len(tokens), **fields)  # type: ignore[arg-type]


def layout(*rows: Row) -> StepLayout:
    return StepLayout(rows, 4, torch.device("cpu"))


def test_tokens_positions_and_slots_follow_the_block_table() -> None:
    found = layout(row([7, 8, 9, 10, 11, 12], 3, 6, [5, 2]), row([1, 2], 1, 2, [0]))
    assert found.input_ids.tolist() == [10, 11, 12, 2]
    assert found.positions.tolist() == [3, 4, 5, 1]
    assert found.write_slots.tolist() == [23, 8, 9, 1]


def test_logits_are_wanted_after_the_newest_token_only() -> None:
    chunk, last = row([1, 2, 3, 4, 5, 6], 0, 3, [0, 1]), row([1, 2, 3], 0, 3, [2])
    assert layout(chunk, last).logit_places.tolist() == [5]
    assert (wanted_logits(chunk), wanted_logits(last)) == (0, 1)


def test_prompt_logprobs_want_logits_after_every_token() -> None:
    scored = row([1, 2, 3, 4, 5, 6], 0, 3, [0, 1], params=SamplingParams(prompt_logprobs=0))
    assert layout(row([1], 0, 1, [3]), scored).logit_places.tolist() == [0, 1, 2, 3]


def test_drafts_follow_the_tokens_and_want_logits_too() -> None:
    found = layout(row([1, 2, 3], 2, 5, [0, 1], draft=(8, 9)))
    assert found.input_ids.tolist() == [3, 8, 9]
    assert found.logit_places.tolist() == [0, 1, 2]


def test_decode_rows_of_similar_length_share_a_padded_group() -> None:
    (group,), prefills = layout(row([1] * 6, 5, 6, [5, 2]), row([1, 2], 1, 2, [0])).groups(None)
    assert prefills == []
    assert group.tokens.tolist() == [0, 1]
    assert group.slots.tolist() == [[20, 21, 22, 23, 8, 9], [0, 1, 1, 1, 1, 1]]
    assert group.visible is not None
    assert group.visible[1, 0, 0].tolist() == [True, True, False, False, False, False]


def test_decode_rows_of_very_different_length_are_not_padded_together() -> None:
    groups, _ = layout(row([1] * 400, 399, 400, list(range(100))), row([1, 2], 1, 2, [100])).groups(None)
    assert sorted(group.slots.shape[1] for group in groups) == [2, 400]


def test_a_window_leaves_only_its_last_positions() -> None:
    (group,), _ = layout(row([1] * 6, 5, 6, [5, 2])).groups(3)
    assert group.slots.tolist() == [[23, 8, 9]]
    _, (prefill,) = layout(row([1] * 6, 3, 6, [5, 2])).groups(3)
    assert prefill.slots.tolist() == [21, 22, 23, 8, 9]
    assert prefill.visible.int().tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize("window", [None, 2])
def test_groups_are_made_once_per_window(window: int | None) -> None:
    found = layout(row([1] * 6, 3, 6, [5, 2]))
    assert found.groups(window) is found.groups(window)
