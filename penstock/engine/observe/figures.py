"""Builds the result of `get_stats()` from the objects that hold the values.

Changes nothing and stores nothing. Called by `InferenceEngine`, from any thread.
"""

from __future__ import annotations

from penstock.api.stats import EngineStats, EngineStatus
from penstock.config import EngineConfig
from penstock.engine.assembly import Parts
from penstock.engine.loop.gate import EngineState
from penstock.engine.loop.host import Host
from penstock.engine.observe.metrics import Metrics
from penstock.scheduling.admission import Admission


def figures(
    config: EngineConfig,
    host: Host,
    admission: Admission,
    metrics: Metrics,
    parts: Parts | None,
    weight_version: int,
) -> EngineStats:
    """All statistics. Values that need a loaded model are empty, 0 or None without `parts`."""
    spec = parts.runner.spec if parts else None
    return {
        "engine_status": _status(host),
        "queue": _queue(host, admission, parts),
        "cache_info": {**parts.cache.stats(), **parts.wanted_blocks} if parts else {"num_entries": 0, "total_size": 0},
        "performance_metrics": metrics.summaries(),
        "totals": dict(metrics.totals),
        "refusals": {"EngineOverloaded": admission.num_refused, **metrics.refusals},
        "memory_usage": parts.runner.memory_usage() if parts else 0.0,
        "device": spec.device if spec else config.device,
        "model": spec.name if spec else None,
        "max_sequence_length": parts.inputs.limit if parts else None,
        "weight_version": weight_version,
        "weight_bytes": spec.weight_bytes if spec else 0,
        "weight_mode": spec.weight_mode if spec else None,
        "packed_bytes": spec.packed_bytes if spec else 0,
        "kernels": spec.kernels if spec else None,
        "rewrites": spec.rewrites if spec else (),
        "tuner": parts.tuning.stats() if parts else {},
        "config": config.model_dump(),
    }


def _queue(host: Host, admission: Admission, parts: Parts | None) -> dict[str, int]:
    """The scheduler's counts of sequences, the number of open requests, and the counts of admission."""
    return {
        **(parts.scheduler.stats() if parts else {"num_waiting": 0, "num_running": 0}),
        "num_requests": host.num_requests,
        "num_queued_requests": admission.num_requests,
        "num_queued_tokens": admission.num_tokens,
    }


def _status(host: Host) -> EngineStatus:
    if host.error is not None or host.state is EngineState.MIXED:
        return "failed"
    if host.closed or not host.started:
        return "stopped"
    if host.state in (EngineState.PAUSED, EngineState.ASLEEP):
        return "paused" if host.state is EngineState.PAUSED else "asleep"
    return "running" if host.ready else "loading"
