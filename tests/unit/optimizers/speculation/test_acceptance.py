"""Acceptance is measured by confidence level, over all requests and then on the request itself."""

from __future__ import annotations

import pytest

from penstock.optimizers.speculation.acceptance import INITIAL_RATES, AcceptanceRates


def test_before_any_measurement_a_higher_level_is_better() -> None:
    rates = AcceptanceRates(weight=4.0, memory=100)
    assert rates.table() == pytest.approx(INITIAL_RATES)
    assert list(INITIAL_RATES) == sorted(INITIAL_RATES)


def test_tokens_before_the_rejected_one_were_accepted_and_later_ones_are_unknown() -> None:
    rates = AcceptanceRates(weight=1.0, memory=10**9)
    rates.record((2, 3, 4), num_accepted=1)
    assert rates.rate(2) == pytest.approx((1 + INITIAL_RATES[2]) / 2)
    assert rates.rate(3) == pytest.approx(INITIAL_RATES[3] / 2)
    assert rates.rate(4) == INITIAL_RATES[4]


def test_a_request_starts_with_the_overall_rates_and_adds_to_them() -> None:
    overall = AcceptanceRates(weight=1.0, memory=10**9)
    for _ in range(99):
        overall.record((5,), num_accepted=0)
    request = AcceptanceRates(overall, weight=4.0, memory=10**9)
    assert request.rate(5) == overall.rate(5) < 0.01
    request.record((5,), num_accepted=1)
    assert request.rate(5) == pytest.approx((1 + 4 * overall.rate(5)) / 5)
    assert AcceptanceRates(overall, weight=4.0, memory=10).rate(5) == overall.rate(5)


def test_old_measurements_count_less() -> None:
    rates = AcceptanceRates(weight=1.0, memory=10)
    for _ in range(50):
        rates.record((1,), num_accepted=0)
    for _ in range(20):
        rates.record((1,), num_accepted=1)
    assert rates.rate(1) > 0.7


def test_probabilities_multiply_and_end_below_the_minimum() -> None:
    rates = AcceptanceRates(weight=1.0, memory=10**9)
    high, low = INITIAL_RATES[6], INITIAL_RATES[0]
    assert rates.probabilities((6, 6, 0)) == pytest.approx([high, high**2, high**2 * low])
    assert len(rates.probabilities((0,) * 8)) == 1
    assert rates.probabilities(()) == []


def test_no_rate_reaches_one() -> None:
    rates = AcceptanceRates(weight=1.0, memory=10**9)
    for _ in range(10_000):
        rates.record((7,), num_accepted=1)
    assert rates.rate(7) < 1.0
