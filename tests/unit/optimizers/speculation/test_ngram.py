"""Drafts come from the sequence itself, where it repeats itself."""

from __future__ import annotations

from penstock.optimizers.speculation.drafter import Draft
from penstock.optimizers.speculation.ngram import NgramDrafter
from tests.unit.optimizers.speculation.drafting import propose, sequence


def test_what_followed_the_last_tokens_before_is_drafted_again() -> None:
    seq = sequence(0, [1, 2, 3, 4, 5, 6, 7], [9, 2, 3])
    assert propose(NgramDrafter(), seq).tokens == (4, 5, 6, 7)
    assert propose(NgramDrafter(), seq, max_tokens=2).tokens == (4, 5)


def test_nothing_is_drafted_where_nothing_repeats() -> None:
    drafter = NgramDrafter()
    assert propose(drafter, sequence(0, [1, 2, 3])) == Draft()
    assert propose(drafter, sequence(1, [1])) == Draft()


def test_a_match_is_followed_rather_than_looked_up_again() -> None:
    """The last two tokens occurred more recently elsewhere; the longer match predicts better."""
    drafter = NgramDrafter()
    seq = sequence(0, [1, 2, 3, 4, 5, 6, 20, 4, 5, 30], [1, 2])
    assert propose(drafter, seq).tokens == (3, 4, 5, 6)
    seq.tokens.extend([3, 4, 5])
    assert propose(drafter, seq).tokens == (6, 20, 4, 5)


def test_a_match_that_was_wrong_is_left() -> None:
    drafter = NgramDrafter()
    seq = sequence(0, [1, 2, 3, 4, 5, 6, 7, 8], [1, 2])
    assert propose(drafter, seq, max_tokens=3).tokens == (3, 4, 5)
    seq.tokens.extend([3, 6])
    assert propose(drafter, seq) == Draft()
    seq.tokens.append(7)
    assert propose(drafter, seq).tokens == (8, 1, 2, 3)


def test_longer_matches_give_more_confidence() -> None:
    drafter = NgramDrafter()
    short = propose(drafter, sequence(0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9], [3, 4]))
    long = propose(drafter, sequence(1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9], [1, 2, 3, 4]))
    assert short.tokens == long.tokens == (5, 6, 7, 8)
    assert all(a <= b for a, b in zip(short.confidences, long.confidences, strict=True))
    assert short.confidences[0] < long.confidences[0]
    assert list(short.confidences) == sorted(short.confidences), "later tokens need all before"


def test_a_loop_is_drafted_beyond_the_end_of_the_output() -> None:
    seq = sequence(0, [5, 6], [1, 2, 3, 1, 2, 3, 1, 2, 3])
    assert propose(NgramDrafter(), seq, max_tokens=8).tokens == (1, 2, 3, 1, 2, 3, 1, 2)


def test_sequences_are_told_apart_and_forgotten() -> None:
    drafter = NgramDrafter()
    first, second = sequence(0, [1, 2, 3, 4], [1, 2]), sequence(1, [1, 2, 8, 9], [1, 2])
    assert propose(drafter, first, max_tokens=1).tokens == (3,)
    assert propose(drafter, second, max_tokens=1).tokens == (8,)
    drafter.forget(0)
    drafter.forget(0)
    assert propose(drafter, sequence(0, [7, 7, 7, 5, 1, 2])) == Draft()
