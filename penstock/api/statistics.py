"""Statistics over a sliding window, written by one thread and readable from any.

Keeps the values only, never their names. Called by the engine's metrics and the facades.
"""

from __future__ import annotations

from collections.abc import Sequence

WINDOW = 2048


def statistics(values: Sequence[float], count: int) -> dict[str, float]:
    """count, mean, min, max, latest and percentiles of the last of `count` values; empty if there are none."""
    if not values:
        return {}
    ordered = sorted(values)
    figures = {
        "count": count,
        "mean": sum(ordered) / len(ordered),
        "min": ordered[0],
        "max": ordered[-1],
        "latest": values[-1],
    }
    return figures | {f"p{q}": _percentile(ordered, q) for q in (50, 90, 95, 99)}


def rate_statistics(amounts: Sequence[float], seconds: Sequence[float], count: int) -> dict[str, float]:
    """`statistics` of amounts per second; the mean is total over total, not a mean of ratios."""
    rates = [amount / time_s if time_s > 0 else 0.0 for amount, time_s in zip(amounts, seconds, strict=True)]
    figures = statistics(rates, count)
    if figures:
        total_s = sum(seconds)
        figures["mean"] = sum(amounts) / total_s if total_s > 0 else 0.0
    return figures


def _percentile(ordered: Sequence[float], q: int) -> float:
    """Nearest-rank percentile of sorted values."""
    return ordered[min(len(ordered) - 1, max(0, -(-q * len(ordered) // 100) - 1))]
