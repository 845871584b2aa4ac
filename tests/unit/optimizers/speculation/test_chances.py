"""How often guesses are right is learnt by kind, from everybody and then from the request itself."""

from __future__ import annotations

import pytest

from penstock.optimizers.speculation.chances import FIRST_GUESS, Chances


def test_before_anything_is_seen_a_higher_kind_is_better() -> None:
    chances = Chances(weight=4.0, memory=100)
    assert chances.table() == pytest.approx(FIRST_GUESS)
    assert list(FIRST_GUESS) == sorted(FIRST_GUESS)


def test_guesses_before_the_wrong_one_were_right_and_those_behind_it_prove_nothing() -> None:
    chances = Chances(weight=1.0, memory=10**9)
    chances.learn((2, 3, 4), accepted=1)
    assert chances.of(2) == pytest.approx((1 + FIRST_GUESS[2]) / 2)
    assert chances.of(3) == pytest.approx(FIRST_GUESS[3] / 2)
    assert chances.of(4) == FIRST_GUESS[4]


def test_a_request_begins_with_what_all_taught_and_teaches_them() -> None:
    everybody = Chances(weight=1.0, memory=10**9)
    for _ in range(99):
        everybody.learn((5,), accepted=0)
    request = Chances(everybody, weight=4.0, memory=10**9)
    assert request.of(5) == everybody.of(5) < 0.01
    request.learn((5,), accepted=1)
    assert request.of(5) == pytest.approx((1 + 4 * everybody.of(5)) / 5)
    assert Chances(everybody, weight=4.0, memory=10).of(5) == everybody.of(5)


def test_what_was_long_ago_counts_less() -> None:
    chances = Chances(weight=1.0, memory=10)
    for _ in range(50):
        chances.learn((1,), accepted=0)
    for _ in range(20):
        chances.learn((1,), accepted=1)
    assert chances.of(1) > 0.7


def test_gains_multiply_and_end_where_nothing_is_left() -> None:
    chances = Chances(weight=1.0, memory=10**9)
    high, low = FIRST_GUESS[6], FIRST_GUESS[0]
    assert chances.gains((6, 6, 0)) == pytest.approx([high, high**2, high**2 * low])
    assert len(chances.gains((0,) * 8)) == 1
    assert chances.gains(()) == []


def test_nothing_is_ever_sure() -> None:
    chances = Chances(weight=1.0, memory=10**9)
    for _ in range(10_000):
        chances.learn((7,), accepted=1)
    assert chances.of(7) < 1.0
