"""A sequence that repeats itself is guessed from its own past."""

from __future__ import annotations

from penstock.optimizers.speculation.drafter import Draft
from penstock.optimizers.speculation.ngram import NgramDrafter
from tests.unit.optimizers.speculation.guessing import propose, sequence


def test_what_followed_the_last_tokens_before_is_guessed_again() -> None:
    seq = sequence(0, [1, 2, 3, 4, 5, 6, 7], [9, 2, 3])
    assert propose(NgramDrafter(), seq).tokens == (4, 5, 6, 7)
    assert propose(NgramDrafter(), seq, most=2).tokens == (4, 5)


def test_nothing_is_said_where_nothing_is_repeated() -> None:
    drafter = NgramDrafter()
    assert propose(drafter, sequence(0, [1, 2, 3])) == Draft()
    assert propose(drafter, sequence(1, [1])) == Draft()


def test_a_match_is_followed_rather_than_looked_up_again() -> None:
    """The last two tokens have come more lately elsewhere; the longer past predicts better."""
    drafter = NgramDrafter()
    seq = sequence(0, [1, 2, 3, 4, 5, 6, 20, 4, 5, 30], [1, 2])
    assert propose(drafter, seq).tokens == (3, 4, 5, 6)
    seq.tokens.extend([3, 4, 5])
    assert propose(drafter, seq).tokens == (6, 20, 4, 5)


def test_a_match_that_was_wrong_is_left() -> None:
    drafter = NgramDrafter()
    seq = sequence(0, [1, 2, 3, 4, 5, 6, 7, 8], [1, 2])
    assert propose(drafter, seq, most=3).tokens == (3, 4, 5)
    seq.tokens.extend([3, 6])
    assert propose(drafter, seq) == Draft()
    seq.tokens.append(7)
    assert propose(drafter, seq).tokens == (8, 1, 2, 3)


def test_longer_matches_are_better_guesses() -> None:
    drafter = NgramDrafter()
    short = propose(drafter, sequence(0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9], [3, 4]))
    long = propose(drafter, sequence(1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9], [1, 2, 3, 4]))
    assert short.tokens == long.tokens == (5, 6, 7, 8)
    assert all(a <= b for a, b in zip(short.kinds, long.kinds, strict=True))
    assert short.kinds[0] < long.kinds[0]
    assert list(short.kinds) == sorted(short.kinds), "a guess counts only where those before it were right"


def test_a_loop_is_guessed_beyond_the_end_of_what_was_said() -> None:
    seq = sequence(0, [5, 6], [1, 2, 3, 1, 2, 3, 1, 2, 3])
    assert propose(NgramDrafter(), seq, most=8).tokens == (1, 2, 3, 1, 2, 3, 1, 2)


def test_sequences_are_told_apart_and_forgotten() -> None:
    drafter = NgramDrafter()
    first, second = sequence(0, [1, 2, 3, 4], [1, 2]), sequence(1, [1, 2, 8, 9], [1, 2])
    assert propose(drafter, first, most=1).tokens == (3,)
    assert propose(drafter, second, most=1).tokens == (8,)
    drafter.forget(0)
    drafter.forget(0)
    assert propose(drafter, sequence(0, [7, 7, 7, 5, 1, 2])) == Draft()
