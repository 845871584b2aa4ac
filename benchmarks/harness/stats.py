"""Percentiles, and the times at which requests arrive. Pure functions of numbers and seeds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate
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


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """When `count` requests arrive, in seconds from the start, at `rate` per second on average, independently.

    The gaps of a Poisson process are exponential. The same seed gives the same pattern at every rate, only faster.
    """
    rng = random.Random(seed)
    return list(accumulate(rng.expovariate(1.0) / rate for _ in range(count)))
