"""Latency and throughput figures over a sliding window, with the right denominators.

Written by the engine's thread at every step; read from any thread. Times are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping

from penstock.api.series import Rate, Series
from penstock.step import StepRecord


class Metrics:
    """What the engine measures about itself. `enabled=False` records nothing."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._series: Mapping[str, Series] = {
            name: Series()
            for name in (
                "batch_processing_time",
                "batch_size",
                "batch_tokens",
                "queue_time",
                "first_token_latency",
                "inter_token_latency",
                "end_to_end_latency",
            )
        }
        self._rates: Mapping[str, Rate] = {"tokens_per_second": Rate(), "prompt_tokens_per_second": Rate()}
        self.totals = {"requests": 0, "prompt_tokens": 0, "generated_tokens": 0, "steps": 0}
        self.totals |= {"drafted_tokens": 0, "accepted_tokens": 0}

    def record(self, name: str, *values: float) -> None:
        """Add values to a series."""
        if self.enabled:
            self._series[name].record(*values)

    def count(self, name: str, amount: int) -> None:
        """Add to a total."""
        if self.enabled:
            self.totals[name] += amount

    def step(self, record: StepRecord) -> None:
        """Account for one step."""
        if not self.enabled:
            return
        self.totals["steps"] += 1
        self.totals["generated_tokens"] += record.generated
        self.totals["drafted_tokens"] += record.drafted
        self.totals["accepted_tokens"] += record.accepted
        series = self._series
        series["batch_processing_time"].record(record.seconds)
        series["batch_size"].record(record.rows)
        series["batch_tokens"].record(record.tokens)
        self._rates["tokens_per_second"].record(record.generated, record.seconds)
        if record.prompt_tokens:
            self._rates["prompt_tokens_per_second"].record(record.prompt_tokens, record.seconds)

    def summaries(self) -> dict[str, dict[str, float]]:
        """Every figure that has values, by name."""
        sources: list[tuple[str, Series | Rate]] = [*self._series.items(), *self._rates.items()]
        return {name: summary for name, source in sources if (summary := source.summary())}
