"""The types of what `get_stats()` returns. Filled by the native engine; read by facades and callers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypedDict

from penstock.config import Value

EngineStatus = Literal["stopped", "loading", "running", "paused", "asleep", "failed"]


class TunerChange(TypedDict):
    """A limit that the tuner changed at a step, and the reason."""

    step: int
    setting: str
    before: float
    after: float
    reason: str


class TunerStats(TypedDict, total=False):
    """The target, the limits in force, the reason for them, and the latest changes; empty without a target."""

    target: str | None
    limits: dict[str, float]
    reason: str
    steps: int
    changes: list[TunerChange]


class EngineStats(TypedDict):
    """Statistics of an engine so far. Values that need a loaded model are empty, 0 or None until it is loaded.

    `queue` holds the scheduler's counts of sequences (num_waiting, num_running, num_preemptions, num_displaced,
    num_finished_<reason>), the number of open requests (num_requests), and the counts of admission
    (num_queued_requests, num_queued_tokens). `cache_info` counts blocks (num_*, swapped_*, evictions) and tokens
    (*_tokens, total_size); usage and hit_rate range from 0 to 1. `performance_metrics` maps each name to count, mean,
    min, max, latest, p50, p90, p95 and p99 of latencies in seconds, batch sizes and rates per second. `memory_usage` is
    a fraction from 0 to 1. `totals` counts each request once, as one of `requests` (accepted and ended, for whatever
    reason) or `displaced_requests` (whose place in a full queue a higher class took), unless it was refused: `refusals`
    counts those by the name of their error, EngineOverloaded for a full queue. `max_sequence_length` is the longest
    sequence that is accepted, in tokens. `weight_mode` is "packed" if the model runs on
    `packed_bytes` of copies of its weights.
    """

    engine_status: EngineStatus
    queue: dict[str, int]
    cache_info: dict[str, float]
    performance_metrics: dict[str, dict[str, float]]
    totals: dict[str, int]
    refusals: dict[str, int]
    memory_usage: float
    device: str
    model: str | None
    max_sequence_length: int | None
    weight_version: int
    weight_bytes: int
    weight_mode: Literal["shared", "packed"] | None
    packed_bytes: int
    kernels: str | None
    rewrites: tuple[str, ...]
    tuner: TunerStats
    config: Mapping[str, Value]
