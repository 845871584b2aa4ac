"""How much memory does the engine use in addition to its weights and K/V cache?

One fresh process imports, loads, starts and works; after each phase its resident memory is read. The cache is as large
as the workload needs, so that all of it is used: pages of a cache that were never written are not resident. The
difference to weights and cache is the interpreter, the libraries, activations and logits.

`private` memory belongs to this process alone: weights that are mapped from a file are resident, but not private. The
memory after the work is compared with the estimate of `MemoryEstimator` for such a batch, from the model's sizes.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from harness.console import finish, note, show
from harness.engines import room
from harness.options import add_model_options, name_of, parser_for, settings_of, source_of
from harness.processes import fresh
from peers.workloads import limits, parse
from penstock import MemoryEstimator

EPILOG = """examples:
  python benchmarks/memory.py
  python benchmarks/memory.py --shape qwen3-0.6b --quantization int8
  python benchmarks/memory.py --shape qwen3-0.6b --workload 32x512+32 --set max_num_batched_tokens=2048
"""
MIB = 1 << 20


def measure(source: str, settings: dict[str, Any], workload: str) -> dict[str, Any]:
    """Run the phases in a fresh process. Raises `ProcessFailed`."""
    needed = {**room(limits(parse(workload))), "log_level": "ERROR"}
    order = {"born": time.monotonic(), "model": source, "settings": {**needed, **settings}, "workload": workload}
    return fresh("harness.lifecycle", json.dumps(order))


def estimated(source: str, settings: dict[str, Any], life: dict[str, Any], workload: str) -> int:
    """The estimated bytes of the weights and of the workload as one batch; quantized weights are not estimated."""
    from transformers import AutoConfig

    batch = parse(workload)[0]
    overrides = {"weight_bytes": life["weight_bytes"]} if "quantization" in settings else {}
    cache_dtype = settings.get("kv_cache_dtype", "auto")
    estimator = MemoryEstimator.from_config(
        AutoConfig.from_pretrained(source),
        dtype=life["dtype"],
        cache_dtype=None if cache_dtype == "auto" else cache_dtype,
        max_step_tokens=settings.get("max_num_batched_tokens", 512),
        **overrides,
    )
    return estimator.estimate_total_memory(batch.requests, batch.shared + batch.unique + batch.output)


def summary(life: dict[str, Any], estimate: int) -> dict[str, Any]:
    """Memory by phase in bytes, relative to weights and cache, and relative to the estimate."""
    memory = {
        phase["phase"]: {name: value for name, value in phase.items() if name.endswith("_bytes")}
        for phase in life["phases"]
    }
    needed = life["weight_bytes"] + life["cache_bytes"]
    libraries = memory["import torch, transformers"]["rss_bytes"]
    worked, peak = (memory["work"][name] for name in ("rss_bytes", "peak_bytes"))
    return {
        "memory": memory,
        "weight_bytes": life["weight_bytes"],
        "cache_bytes": life["cache_bytes"],
        "load_over_weights": round((memory["load"]["rss_bytes"] - libraries) / life["weight_bytes"], 3),
        "work_over_needed": round((worked - libraries) / needed, 3),
        "rss_over_needed": round(worked / needed, 3),
        "peak_over_needed": round(peak / needed, 3),
        "estimated_bytes": estimate,
        "work_over_estimate": round((worked - libraries) / estimate, 3),
    }


def main() -> None:
    """Measure, and print the table and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser)
    parser.add_argument("--workload", metavar="W", default="batch8", help="a name or 8x128+64 (default: batch8)")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    settings = settings_of(args)
    life = measure(source_of(args), settings, args.workload)
    if "rss_bytes" not in life["phases"][0]:
        raise SystemExit("this benchmark reads /proc/self/status, which only Linux has")
    results = summary(life, estimated(source_of(args), settings, life, args.workload))
    rows = [[name, *(round(size / MIB) for size in sizes.values())] for name, sizes in results["memory"].items()]
    show(f"{name_of(args)}, {args.workload}, MiB", ("after", "resident", "private", "peak"), rows)
    note(f"weights {results['weight_bytes'] / MIB:,.1f} MiB, cache {results['cache_bytes'] / MIB:,.1f} MiB")
    note(
        f"loading added {results['load_over_weights']:.2f} of the weights; after work the process holds "
        f"{results['rss_over_needed']:.2f} of weights + cache, {results['work_over_needed']:.2f} without the libraries"
    )
    note(f"that is {results['work_over_estimate']:.2f} of the estimate, {results['estimated_bytes'] / MIB:,.1f} MiB")
    finish({"model": name_of(args), "settings": settings, "workload": args.workload, **results})


if __name__ == "__main__":
    main()
