"""`optimize_memory`: has an engine release what no running request needs, and reports how much that was."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future

from penstock.engine.loop.host import Host
from penstock.errors import EngineClosed
from penstock.models.protocol import ModelRunner

NOTHING_FREED: Mapping[str, float] = {"before": 0.0, "after": 0.0, "freed_bytes": 0}


def optimize_memory(host: Host, runner: ModelRunner) -> dict[str, float]:
    """`InferenceEngine.optimize_memory` of a loaded engine. Waits for the running step, except on its own thread."""
    freed, before = Future[int](), runner.memory_usage()
    try:
        host.post(lambda core: core.housekeeper.clean(freed))
    except EngineClosed:
        freed.set_result(0)
    freed_bytes = 0 if host.on_engine_thread else freed.result()
    return {"before": before, "after": runner.memory_usage(), "freed_bytes": freed_bytes}
