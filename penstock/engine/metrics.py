"""Latency and throughput figures over a sliding window, with the right denominators.

Written by the engine's thread at every step; read from any thread. Times are seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from penstock.step import StepRecord

WINDOW = 2048


class Series:
    """The last `WINDOW` values of one figure, and how many there ever were."""

    __slots__ = ("_values", "count")

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=WINDOW)
        self.count = 0

    def record(self, *values: float) -> None:
        """Add values."""
        self._values.extend(values)
        self.count += len(values)

    def summary(self) -> dict[str, float]:
        """count, mean, min, max, latest and percentiles; empty when nothing was recorded."""
        recorded = list(self._values)  # one copy: the engine's thread records meanwhile
        if not recorded:
            return {}
        values = sorted(recorded)
        found = {
            "count": self.count,
            "mean": sum(values) / len(values),
            "min": values[0],
            "max": values[-1],
            "latest": recorded[-1],
        }
        return found | {f"p{q}": _percentile(values, q) for q in (50, 90, 95, 99)}


def _percentile(ordered: list[float], q: int) -> float:
    """Nearest-rank percentile of sorted values."""
    return ordered[min(len(ordered) - 1, max(0, -(-q * len(ordered) // 100) - 1))]


class Rate:
    """Amounts over the seconds they took. The mean is total over total, not a mean of ratios."""

    __slots__ = ("_amounts", "_rates", "_seconds")

    def __init__(self) -> None:
        self._amounts = Series()
        self._seconds = Series()
        self._rates = Series()

    def record(self, amount: float, seconds: float) -> None:
        """Add an amount and the time it took."""
        self._amounts.record(amount)
        self._seconds.record(seconds)
        self._rates.record(amount / seconds if seconds > 0 else 0.0)

    def summary(self) -> dict[str, float]:
        """As `Series.summary`, per second."""
        found = self._rates.summary()
        if found:
            seconds = self._seconds.summary()["mean"]
            found["mean"] = self._amounts.summary()["mean"] / seconds if seconds > 0 else 0.0
        return found


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

    def step(self, record: StepRecord, drafted: int = 0, accepted: int = 0) -> None:
        """Account for one step.

        Of the tokens through the model `drafted` were guesses, of those generated `accepted` are guesses that were
        right.
        """
        if not self.enabled:
            return
        self.totals["steps"] += 1
        self.totals["generated_tokens"] += record.generated
        self.totals["drafted_tokens"] += drafted
        self.totals["accepted_tokens"] += accepted
        self.record("batch_processing_time", record.seconds)
        self.record("batch_size", record.rows)
        self.record("batch_tokens", record.tokens)
        self._rates["tokens_per_second"].record(record.generated, record.seconds)
        if record.prompt_tokens:
            self._rates["prompt_tokens_per_second"].record(record.prompt_tokens, record.seconds)

    def summaries(self) -> dict[str, dict[str, float]]:
        """Every figure that has values, by name."""
        sources: list[tuple[str, Series | Rate]] = [*self._series.items(), *self._rates.items()]
        return {name: found for name, source in sources if (found := source.summary())}
