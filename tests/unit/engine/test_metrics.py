"""Figures with the right denominators, checked by hand."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import pytest

from penstock.engine import metrics as metrics_module
from penstock.engine.metrics import WINDOW, Metrics, Rate, Series
from penstock.step import StepRecord


def test_nothing_recorded_is_nothing_shown() -> None:
    assert Series().summary() == {}
    assert Rate().summary() == {}
    assert Metrics().summaries() == {}


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
    """The value was there and its count was not yet: the latest one was looked for at place 2047."""
    found: list[dict[str, float]] = []

    class Peeking(deque[float]):
        def extend(self, values: Iterable[float]) -> None:
            super().extend(values)
            found.append(series.summary())  # another thread, at the worst moment

    monkeypatch.setattr(metrics_module, "deque", Peeking)
    series = Series()
    series.record(7.0)
    assert found[0]["latest"] == 7.0


def test_rate_is_total_over_total() -> None:
    rate = Rate()
    rate.record(10, 1.0)
    rate.record(10, 4.0)
    found = rate.summary()
    assert found["mean"] == 4.0  # 20 in 5 s, not the mean of 10 and 2.5
    assert (found["min"], found["max"]) == (2.5, 10.0)


def test_rate_of_no_time_is_zero() -> None:
    rate = Rate()
    rate.record(10, 0.0)
    assert rate.summary()["mean"] == 0.0


def step(rows: int, tokens: int, prompt_tokens: int, generated: int) -> StepRecord:
    """Half a second of work."""
    return StepRecord(0.5, rows, 0, tokens, prompt_tokens, 0.0, generated, 0)


def test_step_counts_rows_tokens_and_time() -> None:
    metrics = Metrics()
    metrics.step(step(rows=3, tokens=34, prompt_tokens=32, generated=2))
    metrics.step(step(rows=2, tokens=2, prompt_tokens=0, generated=2))
    found = metrics.summaries()
    assert found["batch_size"]["mean"] == 2.5
    assert found["batch_tokens"]["max"] == 34
    assert found["tokens_per_second"]["mean"] == 4.0
    assert found["prompt_tokens_per_second"]["mean"] == 64.0  # of the steps that had any
    assert (metrics.totals["generated_tokens"], metrics.totals["steps"]) == (4, 2)


def test_guesses_count_neither_as_prompt_nor_as_output() -> None:
    metrics = Metrics()
    metrics.step(step(rows=2, tokens=10, prompt_tokens=0, generated=5), drafted=8, accepted=3)
    assert "prompt_tokens_per_second" not in metrics.summaries()
    metrics.step(step(rows=2, tokens=30, prompt_tokens=25, generated=2), drafted=4, accepted=1)
    assert metrics.summaries()["prompt_tokens_per_second"]["mean"] == 50.0
    assert (metrics.totals["drafted_tokens"], metrics.totals["accepted_tokens"]) == (12, 4)


def test_disabled_metrics_record_nothing() -> None:
    """Requests were counted all the same."""
    metrics = Metrics(enabled=False)
    metrics.step(step(1, 1, 1, 1))
    metrics.record("queue_time", 1.0)
    metrics.count("requests", 1)
    assert metrics.summaries() == {}
    assert set(metrics.totals.values()) == {0}
