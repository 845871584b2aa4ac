"""Percentiles and arrivals, by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest

from harness.console import cell
from harness.stats import percentile, percentiles
from penstock.cli.workloads import poisson_arrivals


def test_percentile_is_a_value_that_was_measured() -> None:
    values = [float(i) for i in range(10, 0, -1)]
    assert [percentile(values, q) for q in (0, 10, 50, 51, 90, 99, 100)] == [1, 1, 5, 6, 9, 10, 10]


def test_percentiles_of_nothing_are_none() -> None:
    assert percentiles([]) is None
    assert percentiles([1.23456]) == {"p50": 1.235, "p90": 1.235, "p99": 1.235}


def test_arrivals_come_at_the_rate_that_was_asked_for() -> None:
    arrivals = poisson_arrivals(4.0, 20000, seed=1)
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(20000 / 4, rel=0.03)


def test_gaps_between_arrivals_are_exponential() -> None:
    """Standard deviation and mean of an exponential distribution are equal; e^-1 of its gaps exceed the mean."""
    arrivals = [0.0, *poisson_arrivals(1.0, 20000, seed=2)]
    gaps = [after - before for before, after in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.05)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.02)


def test_same_seed_is_the_same_pattern_at_another_rate() -> None:
    slow, fast = poisson_arrivals(1.0, 50, seed=3), poisson_arrivals(10.0, 50, seed=3)
    assert fast == pytest.approx([at / 10 for at in slow])
    assert slow != poisson_arrivals(1.0, 50, seed=4)


def test_cells_show_three_digits_at_least() -> None:
    shown = [cell(value) for value in (None, 0.0, 0.1234, 1.234, 123.45, 12345.6, 12345, "x")]
    assert shown == ["", "0", "0.123", "1.23", "123.5", "12,346", "12,345", "x"]
