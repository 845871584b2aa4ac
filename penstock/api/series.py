"""`Series` and `Rate`: statistics over a sliding window, written by one thread and read from any."""

from __future__ import annotations

from collections import deque

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
        statistics = {
            "count": self.count,
            "mean": sum(values) / len(values),
            "min": values[0],
            "max": values[-1],
            "latest": recorded[-1],
        }
        return statistics | {f"p{q}": _percentile(values, q) for q in (50, 90, 95, 99)}


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
        statistics = self._rates.summary()
        if statistics:
            seconds = self._seconds.summary()["mean"]
            statistics["mean"] = self._amounts.summary()["mean"] / seconds if seconds > 0 else 0.0
        return statistics
