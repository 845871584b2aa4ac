"""Statistics with the right denominators, computed by hand."""

from __future__ import annotations

from penstock.engine.observe.metrics import Metrics
from penstock.step import StepRecord


def test_nothing_recorded_is_nothing_shown() -> None:
    assert Metrics().summaries() == {}


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


def test_draft_tokens_count_neither_as_prompt_nor_as_output() -> None:
    metrics = Metrics()
    metrics.step(step(rows=2, tokens=10, prompt_tokens=0, generated=5)._replace(drafted=8, accepted=3))
    assert "prompt_tokens_per_second" not in metrics.summaries()
    metrics.step(step(rows=2, tokens=30, prompt_tokens=25, generated=2)._replace(drafted=4, accepted=1))
    assert metrics.summaries()["prompt_tokens_per_second"]["mean"] == 50.0
    assert (metrics.totals["drafted_tokens"], metrics.totals["accepted_tokens"]) == (12, 4)


def test_disabled_metrics_record_nothing() -> None:
    """Requests were counted nevertheless."""
    metrics = Metrics(enabled=False)
    metrics.step(step(1, 1, 1, 1))
    metrics.record("queue_time", 1.0)
    metrics.count("requests", 1)
    assert metrics.summaries() == {}
    assert set(metrics.totals.values()) == {0}
