"""The statistics of several replicas as those of one engine, and of each.

Changes nothing and stores nothing. Called by `ReplicatedEngine`, from any thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from penstock.api.stats import EngineStats, EngineStatus
from penstock.engine.observe.metrics import Metrics
from penstock.engine.replicas.dispatcher import Dispatcher
from penstock.engine.replicas.host import RouterHost
from penstock.engine.replicas.replica import Replica
from penstock.scheduling.admission import Admission
from penstock.scheduling.routing import RoutingStats

_SHARED = ("num_queued_requests", "num_queued_tokens")  # counts of the one queue, which every replica reports


class ReplicatedStats(EngineStats):
    """`EngineStats` of all replicas together, of each in `replicas`, and what each was given in `routing`.

    Counts, bytes and totals are sums; latencies are those of all requests; shares are of all blocks and all tokens; a
    rate is that of one replica's steps. What the replicas have in common is that of the first one which serves.
    """

    replicas: list[EngineStats]
    routing: list[RoutingStats]


def replicated_figures(
    replicas: Sequence[Replica], host: RouterHost, dispatcher: Dispatcher, admission: Admission, metrics: Metrics
) -> ReplicatedStats:
    """All statistics. `metrics` are those of the requests that no replica has taken."""
    figures = [replica.figures() for replica in replicas]
    merged = Metrics.merged([metrics, *(replica.metrics for replica in replicas)])
    serving = [part for part, replica in zip(figures, replicas, strict=True) if replica.is_live] or figures
    lead = serving[0]
    return {
        **lead,
        "engine_status": _status(lead, host, dispatcher),
        "queue": _queue(serving, dispatcher),
        "cache_info": _cache_info([part["cache_info"] for part in serving]),
        "performance_metrics": merged.summaries(),
        "totals": dict(merged.totals),
        "refusals": {"EngineOverloaded": admission.num_refused, **merged.refusals},
        "memory_usage": max(part["memory_usage"] for part in serving),
        "weight_bytes": sum(part["weight_bytes"] for part in serving),
        "packed_bytes": sum(part["packed_bytes"] for part in serving),
        "replicas": figures,
        "routing": dispatcher.routing(),
    }


def _status(lead: EngineStats, host: RouterHost, dispatcher: Dispatcher) -> EngineStatus:
    if dispatcher.fault is not None:
        return "failed"
    if host.is_closed or not host.is_started:
        return "stopped"
    return lead["engine_status"] if host.booted.done() else "loading"


def _queue(parts: Sequence[EngineStats], dispatcher: Dispatcher) -> dict[str, int]:
    total = Counter[str]()
    for part in parts:
        total.update(part["queue"])
    shared = {name: parts[0]["queue"][name] for name in _SHARED}
    return {
        **total,
        **shared,
        "num_requests": dispatcher.num_requests,
        "num_waiting": total["num_waiting"] + dispatcher.num_waiting,
    }


def _cache_info(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    if "usage" in total:
        total["usage"] = 1.0 - total["num_free_blocks"] / total["num_blocks"]
        total["hit_rate"] = total["hit_tokens"] / total["query_tokens"] if total["query_tokens"] else 0.0
    return total
