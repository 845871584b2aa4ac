"""Sequences as one row in which every shared prefix stands once."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penstock.models.gradients.packing import PackedRow, Segment, pack


def packed(*sequences: list[int], share_prefixes: bool = True) -> PackedRow:
    return pack([np.array(sequence, dtype=np.int64) for sequence in sequences], share_prefixes=share_prefixes)


def test_a_shared_prompt_stands_once_before_its_completions() -> None:
    row = packed([1, 2, 3, 4, 5], [1, 2, 3, 6])
    assert row.input_ids.tolist()[:3] == [1, 2, 3]
    assert sorted(row.segments, key=lambda each: each.end - each.begin) == [
        Segment(3, 4, 3, ((0, 3),)),
        Segment(4, 6, 3, ((0, 3),)),
        Segment(0, 3, 0, ()),
    ]
    assert [place.tolist() for place in row.places] == [[0, 1, 2, 4, 5], [0, 1, 2, 3]]
    assert row.positions.tolist() == [0, 1, 2, 3, 3, 4]


def test_a_sequence_that_is_the_beginning_of_another_adds_no_token() -> None:
    row = packed([1, 2, 3], [1, 2], [1, 2, 3])
    assert row.input_ids.tolist() == [1, 2, 3]
    assert [place.tolist() for place in row.places] == [[0, 1, 2], [0, 1], [0, 1, 2]]


def test_prefixes_of_prefixes_are_shared() -> None:
    row = packed([1, 2, 3, 4], [1, 2, 3, 5], [1, 6])
    assert len(row.input_ids) == 6
    deepest = [segment for segment in row.segments if len(segment.ancestors) == 2]
    assert [segment.position for segment in deepest] == [3, 3]


def test_without_sharing_every_sequence_stands_there_whole() -> None:
    row = packed([1, 2, 3], [1, 2, 3], share_prefixes=False)
    assert row.input_ids.tolist() == [1, 2, 3, 1, 2, 3]
    assert [segment.ancestors for segment in row.segments] == [(), ()]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=12))
def test_every_token_follows_exactly_its_own_prefix(sequences: list[list[int]]) -> None:
    row = packed(*sequences)
    prefixes = {tuple(sequence[:end]) for sequence in sequences for end in range(1, len(sequence) + 1)}
    assert len(row.input_ids) == len(prefixes)
    context = {
        index: [*(i for span in segment.ancestors for i in range(*span)), *range(segment.begin, index + 1)]
        for segment in row.segments
        for index in range(segment.begin, segment.end)
    }
    for sequence, place in zip(sequences, row.places, strict=True):
        assert row.input_ids[place].tolist() == sequence
        assert row.positions[place].tolist() == list(range(len(sequence)))
        assert context[int(place[-1])] == place.tolist()
