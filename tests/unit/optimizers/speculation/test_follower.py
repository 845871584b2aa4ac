"""A text that is repeated is read on from the place that was reached."""

from __future__ import annotations

from array import array

import pytest

from penstock.optimizers.speculation.drafter import Draft
from penstock.optimizers.speculation.follower import Follower
from penstock.optimizers.speculation.index import Match, Text


def following(text: list[int], at: int, length: int, seen: list[int]) -> Follower:
    """A follower that has seen so many tokens of its sequence, and was then given a match."""
    follower = Follower()
    follower.follow(seen)
    follower.match = Match(Text(0, text, array("q")), at, length)
    return follower


def test_a_match_that_goes_on_grows_with_every_token() -> None:
    follower = following([10, 11, 12, 13, 14, 15], 2, 2, [10, 11])
    follower.follow([10, 11, 12])
    assert follower.match is not None
    assert (follower.match.at, follower.match.length) == (3, 3)
    follower.follow([10, 11, 12, 13, 14])
    assert (follower.match.at, follower.match.length) == (5, 5)
    assert follower.read(4, own=False).tokens == (15,)


def test_another_token_ends_the_match() -> None:
    follower = following([10, 11, 12, 13], 2, 2, [10, 11])
    follower.follow([10, 11, 12, 9])
    assert follower.match is None
    assert follower.read(4, own=False) == Draft()


def test_a_match_ends_with_its_text() -> None:
    follower = following([10, 11, 12], 2, 2, [10, 11])
    follower.follow([10, 11, 12])
    assert follower.match is not None
    assert follower.read(2, own=False) == Draft()
    follower.follow([10, 11, 12, 13])
    assert follower.match is None


@pytest.mark.parametrize(("own", "tokens"), [(True, (12, 13, 12, 13, 12)), (False, (12, 13))])
def test_a_text_of_its_own_is_a_loop(own: bool, tokens: tuple[int, ...]) -> None:
    """Beyond its end lies what follows it: itself."""
    assert following([10, 11, 12, 13], 2, 2, [12, 13]).read(5, own=own).tokens == tokens


def test_the_kind_of_a_guess_says_how_long_the_past_is_that_it_rests_on() -> None:
    """The number of bits of the length, at most 7."""
    text = list(range(200))
    assert following(text, 3, 3, [1, 2]).read(6, own=False).kinds == (2, 3, 3, 3, 3, 4)
    assert following(text, 100, 62, [1, 2]).read(4, own=False).kinds == (6, 6, 7, 7)
    assert following(text, 100, 127, [1, 2]).read(3, own=False).kinds == (7, 7, 7)
