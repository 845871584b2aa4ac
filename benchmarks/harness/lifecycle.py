"""The phases of one engine in a fresh process: `python -m harness.lifecycle ORDER` prints one JSON line.

ORDER is JSON: `born` (the parent's `time.monotonic()`, one clock for all processes), `model`, `settings`, `workload`
(to run after the first token, or null). Each phase has its seconds and the memory at its end.
"""

from __future__ import annotations

import time

ENTERED = time.monotonic()  # the imports below belong to the next phase

import json  # noqa: E402
import sys  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from typing import Any  # noqa: E402

FIRST_PROMPT = [5] * 16


class PhaseLog:
    """Phases in the order of their ends."""

    def __init__(self, born: float) -> None:
        self.phases: list[dict[str, Any]] = []
        self._last = born

    def end(self, name: str, now: float | None = None) -> None:
        """Record the phase `name`, which ended `now`. The time of recording belongs to no phase."""
        seconds = (now or time.monotonic()) - self._last
        self.phases.append({"phase": name, "seconds": round(seconds, 4), **memory()})
        self._last = now or time.monotonic()


def memory() -> dict[str, int]:
    """Bytes of this process: resident, private, and the peak of the resident ones. Linux only."""
    names = {"VmRSS": "rss_bytes", "RssAnon": "private_bytes", "VmHWM": "peak_bytes"}
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            fields = dict(line.split(":", 1) for line in status)
    except OSError:
        return {}
    return {name: int(fields[key].split()[0]) * 1024 for key, name in names.items() if key in fields}


def live(order: dict[str, Any]) -> dict[str, Any]:
    """Import, load, start, generate; the phases, and the sizes that memory is compared with."""
    phase_log = PhaseLog(order["born"])
    phase_log.end("interpreter", ENTERED)
    from penstock import EngineConfig, InferenceEngine

    torch_early = "torch" in sys.modules
    phase_log.end("import penstock")
    from penstock.models import loading

    phase_log.end("import torch, transformers")
    config = EngineConfig(**order["settings"])
    with ThreadPoolExecutor(1) as alone:  # PyTorch's worker threads end with the thread that they belong to
        loaded = alone.submit(loading.load, order["model"], None, config).result()
    phase_log.end("load")
    engine = InferenceEngine(loaded.runner, loaded.tokenizer, config)
    try:
        serve(engine, order["workload"], loaded.runner.spec.vocab_size, phase_log)
        blocks = engine.get_stats()["cache_info"]["num_blocks"]
    finally:
        engine.stop(drain=0.0)
    return {
        "phases": phase_log.phases,
        "torch_with_penstock": torch_early,
        "dtype": loaded.runner.spec.dtype,
        "weight_bytes": loaded.runner.spec.weight_bytes,
        "cache_bytes": int(blocks) * config.block_size * loaded.runner.spec.kv_bytes_per_token,
    }


def serve(engine: Any, workload: str | None, vocab_size: int, phase_log: PhaseLog) -> None:
    """The remaining phases, on an engine that was not started yet."""
    from peers.workloads import parse

    engine.start()
    phase_log.end("start")
    generate(engine, [(FIRST_PROMPT, 1)])
    phase_log.end("first token")
    if workload:
        generate(engine, parse(workload)[0].draw(0, vocab_size))
        phase_log.end("work")


def generate(engine: Any, work: list[tuple[list[int], int]]) -> None:
    """Run all requests concurrently to their ends."""
    from penstock import SamplingParams

    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for _, count in work]
    for handle in [engine.generate(ids, request_params) for (ids, _), request_params in zip(work, params, strict=True)]:
        handle.result()


if __name__ == "__main__":
    print(json.dumps(live(json.loads(sys.argv[1]))))
