"""The life of one engine in a fresh process, phase by phase: `python -m harness.life ORDER` prints one JSON line.

ORDER is JSON: `born` (the parent's `time.monotonic()`, one clock for all processes), `model`, `settings`, `workload`
(what to run after the first token, or null). Each phase says how many seconds it took and the memory after it.
"""

from __future__ import annotations

import time

ENTERED = time.monotonic()  # the imports below belong to the next phase

import json  # noqa: E402
import sys  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from typing import Any  # noqa: E402

FIRST_PROMPT = [5] * 16


class Diary:
    """Phases in the order in which they ended."""

    def __init__(self, born: float) -> None:
        self.phases: list[dict[str, Any]] = []
        self._last = born

    def end(self, name: str, now: float | None = None) -> None:
        """What was going on until `now` is called `name`. The time it takes to write this down belongs to nobody."""
        seconds = (now or time.monotonic()) - self._last
        self.phases.append({"phase": name, "seconds": round(seconds, 4), **memory()})
        self._last = now or time.monotonic()


def memory() -> dict[str, int]:
    """Bytes that this process holds now, of those what is private to it, and the most it ever held. Linux only."""
    wanted = {"VmRSS": "rss_bytes", "RssAnon": "private_bytes", "VmHWM": "peak_bytes"}
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            fields = dict(line.split(":", 1) for line in status)
    except OSError:
        return {}
    return {name: int(fields[key].split()[0]) * 1024 for key, name in wanted.items() if key in fields}


def live(order: dict[str, Any]) -> dict[str, Any]:
    """Import, load, start, generate; what each phase took, and the sizes that memory is compared with."""
    diary = Diary(order["born"])
    diary.end("interpreter", ENTERED)
    from penstock import EngineConfig, InferenceEngine

    torch_early = "torch" in sys.modules
    diary.end("import penstock")
    from penstock.models import loading

    diary.end("import torch, transformers")
    config = EngineConfig(**order["settings"])
    with ThreadPoolExecutor(1) as alone:  # PyTorch's helper threads end with the thread that they belong to
        loaded = alone.submit(loading.load, order["model"], None, config).result()
    diary.end("load")
    engine = InferenceEngine(loaded.runner, loaded.tokenizer, config)
    try:
        serve(engine, order["workload"], loaded.runner.spec.vocab_size, diary)
        blocks = engine.get_stats()["cache_info"]["num_blocks"]
    finally:
        engine.stop(drain=0.0)
    return {
        "phases": diary.phases,
        "torch_with_penstock": torch_early,
        "dtype": loaded.runner.spec.dtype,
        "weight_bytes": loaded.runner.spec.weight_bytes,
        "cache_bytes": int(blocks) * config.block_size * loaded.runner.spec.kv_bytes_per_token,
    }


def serve(engine: Any, workload: str | None, vocab_size: int, diary: Diary) -> None:
    """The rest of the phases, on an engine that was not started yet."""
    from peers.workloads import parse

    engine.start()
    diary.end("start")
    generate(engine, [(FIRST_PROMPT, 1)])
    diary.end("first token")
    if workload:
        generate(engine, parse(workload)[0].draw(0, vocab_size))
        diary.end("work")


def generate(engine: Any, work: list[tuple[list[int], int]]) -> None:
    """All requests at once, to their ends."""
    from penstock import SamplingParams

    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for _, count in work]
    for handle in [engine.generate(ids, asked) for (ids, _), asked in zip(work, params, strict=True)]:
        handle.result()


if __name__ == "__main__":
    print(json.dumps(live(json.loads(sys.argv[1]))))
