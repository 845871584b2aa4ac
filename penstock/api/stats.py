"""The shape of `get_stats()`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypedDict

from penstock.config import Value


class TunerChange(TypedDict):
    """A limit that the tuner moved after so many steps, and why."""

    step: int
    setting: str
    before: float
    after: float
    reason: str


class TunerStats(TypedDict, total=False):
    """The goal, the limits in force, what they rest on, and the latest changes; empty without a goal."""

    target: str | None
    limits: dict[str, float]
    reason: str
    steps: int
    changes: list[TunerChange]


class EngineStats(TypedDict):
    """Figures of an engine so far. What only a loaded model knows is empty, 0 or None until then.

    `queue` counts sequences as the scheduler does (num_waiting, num_running, num_preemptions, num_finished_<reason>),
    requests that have not ended (num_requests), and what admission counts (num_queued_requests, num_queued_tokens).
    `cache_info` counts blocks (num_*, swapped_*, evictions) and tokens (*_tokens, total_size), with usage and hit_rate
    from 0 to 1. `performance_metrics` holds, by name, count, mean, min, max, latest, p50, p90, p95 and p99 of latencies
    in seconds, batch sizes and rates per second. `memory_usage` is a fraction from 0 to 1.
    """

    engine_status: Literal["stopped", "loading", "running", "failed"]
    queue: dict[str, int]
    cache_info: dict[str, float]
    performance_metrics: dict[str, dict[str, float]]
    totals: dict[str, int]
    memory_usage: float
    device: str
    model: str | None
    weight_bytes: int
    kernels: str | None
    rewrites: tuple[str, ...]
    tuner: TunerStats
    config: Mapping[str, Value]
