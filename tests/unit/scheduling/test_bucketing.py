"""Buckets and padding, by hand. B4-18 names tests of an earlier engine whose expectations its own code did not meet."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock import SequenceBucketer, calculate_padding_efficiency, create_padded_batch
from penstock.errors import RequestError, RequestTooLarge
from penstock.scheduling.bucketing import similar


def test_two_buckets_are_two() -> None:
    """B4-18: with fixed borders these were three, though 120 and 130 differ by 10."""
    bucketer = SequenceBucketer(bucket_size=64)
    for item, length in (("seq1", 50), ("seq2", 60), ("seq3", 120), ("seq4", 130)):
        bucketer.add_sequence(item, length)
    assert bucketer.buckets == {60: [("seq1", 50), ("seq2", 60)], 130: [("seq3", 120), ("seq4", 130)]}
    assert bucketer.get_batch_from_bucket(max_batch_size=3) == ([("seq1", 50), ("seq2", 60)], 60)
    assert bucketer.get_batch_from_bucket(max_batch_size=3) == ([("seq3", 120), ("seq4", 130)], 130)
    assert bucketer.get_batch_from_bucket(max_batch_size=3) == ([], 0)


def test_short_and_long_are_split_by_the_difference_that_is_asked_for() -> None:
    """B4-18: lengths 2 and 6 differ by less than 128, so one batch was the right answer then."""
    assert similar([2, 2, 6, 6], 128) == [[2, 2, 6, 6]]
    assert similar([6, 2, 6, 2], 3) == [[2, 2], [6, 6]]
    assert similar([], 3) == []


@given(st.lists(st.integers(1, 60)), st.integers(0, 20))
def test_groups_are_tight_and_as_few_as_can_be(lengths: list[int], size: int) -> None:
    groups = similar(lengths, size)
    assert sorted(length for group in groups for length in group) == sorted(lengths)
    assert all(group[-1] - group[0] <= size for group in groups)
    # Shortest members of different groups can share none: each is out of reach of the one before.
    assert all(right[0] - left[0] > size for left, right in pairwise(groups))


def test_bucketer_gives_the_bucket_of_the_oldest_and_keeps_the_rest() -> None:
    """It gave the fullest one: an odd length starved while others kept coming."""
    bucketer = SequenceBucketer(bucket_size=5)
    items = [("a", 10), ("b", 30), ("c", 11), ("d", 31), ("e", 32), ("f", 32)]
    for item, length in items:
        bucketer.add_sequence(item, length)
    assert bucketer.get_all_items() == items
    assert bucketer.get_batch_from_bucket(3) == ([("a", 10), ("c", 11)], 11)
    assert bucketer.get_batch_from_bucket(3) == ([("b", 30), ("d", 31), ("e", 32)], 32)
    assert bucketer.get_all_items() == [("f", 32)]
    bucketer.clear()
    assert (bucketer.get_all_items(), bucketer.buckets) == ([], {})


def test_bucketer_keeps_equal_items_apart() -> None:
    bucketer = SequenceBucketer()
    for _ in range(3):
        bucketer.add_sequence("same", 7)
    assert bucketer.get_batch_from_bucket(2) == ([("same", 7)] * 2, 7)
    assert bucketer.get_all_items() == [("same", 7)]


def test_bucketer_refuses_what_has_no_length() -> None:
    with pytest.raises(RequestError, match="at least 1 token"):
        SequenceBucketer().add_sequence("x", 0)
    with pytest.raises(RequestError, match="bucket_size"):
        SequenceBucketer(-1)


def test_padding_efficiency_counts_every_token() -> None:
    figures = calculate_padding_efficiency([10, 15, 20, 12])
    assert figures == {
        "total_tokens": 57,
        "padding_tokens": 23,
        "efficiency": 57 / 80,
        "waste_ratio": pytest.approx(23 / 80),
        "max_length": 20,
        "min_length": 10,
        "avg_length": 14.25,
        "length_variance": pytest.approx(((4.25) ** 2 + 0.75**2 + 5.75**2 + 2.25**2) / 4),
    }
    assert calculate_padding_efficiency([]) == {}
    assert calculate_padding_efficiency([7, 7])["efficiency"] == 1.0


def test_padded_batch_holds_every_token_and_says_where() -> None:
    tensors = [torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]]), torch.tensor([6, 7, 8, 9])]
    batch = create_padded_batch(tensors, padding_token_id=0, max_length=4)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["attention_mask"].dtype == torch.int64


def test_padding_may_lie_on_the_left_for_models_that_continue_the_last_column() -> None:
    batch = create_padded_batch([torch.tensor([1]), torch.tensor([2, 3])], padding_token_id=9, padding_side="left")
    assert batch["input_ids"].tolist() == [[9, 1], [2, 3]]
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 1]]
    with pytest.raises(RequestError, match="padding_side"):
        create_padded_batch([torch.tensor([1])], padding_side="middle")


def test_masks_of_the_caller_are_kept() -> None:
    tensors, masks = [torch.tensor([1, 2]), torch.tensor([3])], [torch.tensor([0, 1]), None]
    assert create_padded_batch(tensors, masks)["attention_mask"].tolist() == [[0, 1], [1, 0]]


def test_nothing_is_cut_off_to_fit() -> None:
    with pytest.raises(RequestTooLarge, match="3 tokens is longer than max_length=2"):
        create_padded_batch([torch.tensor([1, 2, 3])], max_length=2)
    assert create_padded_batch([]) == {}
