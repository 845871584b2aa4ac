"""Step times are measured on the steps that ran, in spite of disturbances."""

from __future__ import annotations

import random

import pytest

from penstock.optimizers.speculation.step_times import STALE, StepTimeCurve


def curve_of(*measured: tuple[int, float], times: int = 3) -> StepTimeCurve:
    curve = StepTimeCurve()
    for _ in range(times):
        for tokens, seconds in measured:
            curve.record(tokens, seconds)
    return curve


def test_nothing_is_known_at_first() -> None:
    curve = StepTimeCurve()
    assert not curve.is_known(1)
    assert curve.seconds(5) == 0.0
    curve.record(1, 0.0)
    assert not curve.is_known(1), "a clock that stands still measures nothing"


def test_times_are_linear_between_and_beyond_what_was_measured() -> None:
    curve = curve_of((1, 0.010), (9, 0.018), (17, 0.034))
    assert curve.seconds(5) == pytest.approx(0.014)
    assert curve.seconds(13) == pytest.approx(0.026)
    assert curve.seconds(21) == pytest.approx(0.042)
    assert curve.up_to(3)[:2] == [0.010, 0.010]


def test_a_single_measurement_holds_everywhere_but_is_not_trusted_far() -> None:
    curve = curve_of((4, 0.02))
    assert curve.seconds(100) == 0.02
    assert curve.reach == 8


def test_more_tokens_never_take_less_time() -> None:
    curve = curve_of((1, 0.012), (2, 0.010), (8, 0.020))
    assert curve.seconds(1) == curve.seconds(2) == pytest.approx(0.011, abs=0.001)
    assert curve.up_to(20) == sorted(curve.up_to(20))


def test_similar_numbers_of_tokens_share_a_bucket() -> None:
    curve = curve_of((64, 0.10), (68, 0.10))
    assert [tokens for tokens in (15, 16, 17, 63, 64, 71, 72, 80) if curve.is_known(tokens)] == [64, 71]


def test_one_draft_may_cost_more_than_its_token() -> None:
    """With 32 rows, steps of 32 to 35 tokens share a bucket, but plain steps not with others."""
    curve = StepTimeCurve()
    for _ in range(20):
        curve.record(32, 0.0060)
        curve.record(34, 0.0070, drafted=True)
    assert curve.seconds(32) == pytest.approx(0.0060)
    assert curve.seconds(34) == pytest.approx(0.0070)
    assert curve.is_known(33)
    assert not curve.is_known(48)


def test_the_same_number_of_tokens_may_be_plain_or_not() -> None:
    curve = StepTimeCurve()
    for _ in range(20):
        curve.record(4, 0.004)
        curve.record(4, 0.006, drafted=True)
    assert curve.seconds(4) == pytest.approx(0.004)
    assert curve.seconds(8) >= 0.004


def test_outliers_hardly_count() -> None:
    rng, curve = random.Random(0), StepTimeCurve()
    for _ in range(300):
        curve.record(1, 0.010 * (1 if rng.random() < 0.9 else rng.uniform(2, 20)))
    assert 0.010 <= curve.seconds(1) < 0.013


def test_a_time_that_changed_is_followed() -> None:
    curve = curve_of((1, 0.010), times=50)
    for _ in range(64):
        curve.record(1, 0.030)
    assert curve.seconds(1) == pytest.approx(0.030, rel=0.05)
    for _ in range(16):
        curve.record(1, 0.010)
    assert curve.seconds(1) == pytest.approx(0.010, rel=0.1)


def test_a_time_is_known_for_exactly_so_many_steps() -> None:
    curve = StepTimeCurve()
    curve.record(8, 0.080)
    for _ in range(4):
        assert curve.is_known(8, within=5)
        curve.record(1, 0.010)
    assert curve.is_known(8, within=5), "the fifth of the last five steps"
    curve.record(1, 0.010)
    assert not curve.is_known(8, within=5)


def test_stale_measurements_decay() -> None:
    curve = curve_of((1, 0.010), (8, 0.080))
    for _ in range(STALE + 16):
        curve.record(1, 0.010)
    assert not curve.is_known(8)
    assert 0.010 < curve.seconds(8) < 0.045, "and is given another chance"
