"""Percentiles. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], q: float) -> float:
    """The nearest-rank percentile: the least value that at least q % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(1, ceil(q * len(ordered) / 100)) - 1]


def percentiles(values: Sequence[float], digits: int = 3) -> dict[str, float] | None:
    """p50, p90 and p99, rounded; None of no values."""
    if not values:
        return None
    return {f"p{q}": round(percentile(values, q), digits) for q in PERCENTILES}
