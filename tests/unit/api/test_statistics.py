"""Statistics with the right denominators, computed by hand."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import pytest

from penstock.api.statistics import WINDOW, rate_statistics
from penstock.engine.observe import metrics as series_module
from penstock.engine.observe.metrics import Series


def test_nothing_recorded_is_nothing_shown() -> None:
    assert Series().summary() == {}
    assert rate_statistics([], [], 0) == {}


def test_series_of_one_to_one_hundred() -> None:
    series = Series()
    for value in range(100, 0, -1):
        series.record(value)
    found = series.summary()
    assert (found["count"], found["mean"], found["min"], found["max"], found["latest"]) == (100, 50.5, 1, 100, 1)
    assert [found[f"p{q}"] for q in (50, 90, 95, 99)] == [50, 90, 95, 99]


def test_window_forgets_the_oldest_and_counts_all() -> None:
    series = Series()
    for value in range(WINDOW + 3):
        series.record(value)
    found = series.summary()
    assert (found["count"], found["min"], found["max"], found["latest"]) == (WINDOW + 3, 3, WINDOW + 2, WINDOW + 2)


def test_values_of_one_step_are_recorded_together() -> None:
    one_by_one, together = Series(), Series()
    for value in range(WINDOW + 3):
        one_by_one.record(value)
    together.record(*range(WINDOW + 3))
    together.record()
    assert together.summary() == one_by_one.summary()


def test_summary_while_the_first_value_is_being_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value was present but not yet counted, so the latest value was read at index 2047."""
    found: list[dict[str, float]] = []

    class Peeking(deque[float]):
        def extend(self, values: Iterable[float]) -> None:
            super().extend(values)
            found.append(series.summary())  # another thread, at the worst moment

    monkeypatch.setattr(series_module, "deque", Peeking)
    series = Series()
    series.record(7.0)
    assert found[0]["latest"] == 7.0


def test_rate_is_total_over_total() -> None:
    found = rate_statistics([10, 10], [1.0, 4.0], 2)
    assert found["mean"] == 4.0  # 20 in 5 s, not the mean of 10 and 2.5
    assert (found["min"], found["max"]) == (2.5, 10.0)


def test_rate_of_no_time_is_zero() -> None:
    assert rate_statistics([10], [0.0], 1)["mean"] == 0.0
