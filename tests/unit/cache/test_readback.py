"""When reading back is worth it: the figures by hand."""

from __future__ import annotations

from array import array

import pytest

from penstock.cache.readback import WINDOW, ReadBack, TokenTime, reading_is_cheaper
from penstock.sampling import SamplingParams
from penstock.step import Row, StepPlan


def plan(num_tokens: int, num_rows: int = 1, *, moved: int = 0, samples: bool = True) -> StepPlan:
    """Rows that share `num_tokens`, and `moved` blocks read back."""
    each = num_tokens // num_rows
    row = Row(0, [0] * each, 0, each, array("i", [0]), samples, SamplingParams(), each)
    return StepPlan((row,) * num_rows, swaps_in=tuple((i, i) for i in range(moved)))


def test_reading_must_take_less_time_than_computing_what_is_gained() -> None:
    assert reading_is_cheaper(100, 100, read_s=0.1, compute_s=0.2)
    assert not reading_is_cheaper(100, 100, read_s=0.2, compute_s=0.2)
    assert reading_is_cheaper(100, 300, read_s=0.2, compute_s=0.1), "200 more tokens follow on those read"


def test_the_first_reading_is_always_worth_it() -> None:
    read_back = ReadBack(4)
    assert read_back.pays_off(4, 4)
    read_back.learn(plan(10), {"forward": 1.0})
    assert read_back.pays_off(4, 4)


def test_figures_are_seconds_per_token_of_what_was_moved_and_what_was_computed() -> None:
    read_back = ReadBack(4)
    read_back.learn(plan(10, moved=5), {"swap": 0.4, "forward": 1.0})
    assert read_back.moving.seconds_per_token == pytest.approx(0.02)
    assert read_back.computing.seconds_per_token == pytest.approx(0.1)
    assert read_back.pays_off(40, 40)
    read_back.learn(plan(10, moved=5), {"swap": 9.6, "forward": 1.0})
    assert not read_back.pays_off(40, 40), "a quarter of a second each by now"


def test_steps_that_mostly_decode_say_nothing_about_prefilling() -> None:
    read_back = ReadBack(4)
    read_back.learn(plan(8, num_rows=8), {"forward": 1.0})
    assert read_back.computing.seconds_per_token is None
    read_back.learn(plan(32, num_rows=8), {"forward": 1.0})
    assert read_back.computing.seconds_per_token == 1 / 32


def test_computing_is_over_when_tokens_are_there() -> None:
    read_back = ReadBack(4)
    read_back.learn(plan(10, samples=False), {"forward": 0.001})
    assert read_back.computing.seconds_per_token is None
    read_back.learn(plan(10), {"forward": 0.001, "sample": 0.999})
    assert read_back.computing.seconds_per_token == pytest.approx(0.1)


def test_a_model_that_tells_no_times_is_believed_to_read_fast() -> None:
    read_back = ReadBack(4)
    read_back.learn(plan(10, moved=5), {})
    assert read_back.pays_off(4, 4)


def test_old_records_are_forgotten() -> None:
    rate = TokenTime()
    rate.record(1, 1000.0)
    for _ in range(WINDOW):
        rate.record(3, 1.5)
    assert rate.seconds_per_token == 0.5
