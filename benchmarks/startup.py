"""How long until the first token, and where does that time go?

Two tables. Imports: a fresh interpreter that does nothing, that imports penstock, and that imports torch and
transformers, each timed from outside, because `import penstock` should import neither of those two. Start: a fresh
process from its start to its first token, by phase, with its peak memory and the bytes of its weights and cache.

Medians of several processes. Files are read from the operating system's cache, as at the second start of a day: one
unmeasured process runs first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from statistics import median
from typing import Any

from harness.console import Step, finish, progress, show
from harness.options import add_model_options, name_of, parser_for, settings_of, source_of
from harness.processes import fresh, own_environment

EPILOG = """examples:
  python benchmarks/startup.py
  python benchmarks/startup.py --shape qwen3-0.6b --repeats 5
  python benchmarks/startup.py --shape qwen3-0.6b --set verify_model=false | tail -1 | jq .first_token_s
"""
IMPORTS = {
    "interpreter": "pass",
    "penstock": "import penstock",
    "torch": "import torch",
    "torch + transformers": "import torch; from transformers import AutoModelForCausalLM",
}


def import_seconds(statement: str) -> float:
    """How long a process takes that runs one statement."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], env=own_environment(), stdin=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def start(source: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One fresh process from its start to its first token. Raises `ProcessFailed`."""
    order = {"born": time.monotonic(), "model": source, "settings": settings, "workload": None}
    return fresh("harness.lifecycle", json.dumps(order))


def summary(imports: dict[str, list[float]], starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, in seconds; sizes in bytes."""
    names = [phase["phase"] for phase in starts[0]["phases"]]
    phases = {name: round(median(life["phases"][i]["seconds"] for life in starts), 4) for i, name in enumerate(names)}
    return {
        "imports_s": {name: round(median(seconds), 4) for name, seconds in imports.items()},
        "penstock_imports_torch": starts[0]["torch_with_penstock"],
        "phases_s": phases,
        "first_token_s": round(median(sum(p["seconds"] for p in life["phases"]) for life in starts), 4),
        "peak_rss_bytes": max(life["phases"][-1].get("peak_bytes", 0) for life in starts) or None,
        "weight_bytes": starts[0]["weight_bytes"],
        "cache_bytes": starts[0]["cache_bytes"],
    }


def measure(source: str, settings: dict[str, Any], repeats: int, step: Step) -> dict[str, Any]:
    """Everything, `repeats` times after an unmeasured first time."""
    imports: dict[str, list[float]] = {name: [] for name in IMPORTS}
    starts: list[dict[str, Any]] = []
    for turn in range(repeats + 1):
        step("unmeasured" if turn == 0 else f"repeat {turn}")
        seconds = {name: import_seconds(statement) for name, statement in IMPORTS.items()}
        life = start(source, settings)
        if turn:
            starts.append(life)
            for name, value in seconds.items():
                imports[name].append(value)
    return summary(imports, starts)


def main() -> None:
    """Measure, and print the tables and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser)
    parser.add_argument("--repeats", type=int, metavar="N", default=3, help="medians are over these (default: 3)")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    source, settings = source_of(args), settings_of(args)
    with progress(args.repeats + 1) as step:
        results = measure(source, {"log_level": "ERROR", **settings}, args.repeats, step)
    bare = results["imports_s"]["interpreter"]
    rows = [[name, value, value - bare] for name, value in results["imports_s"].items()]
    show("imports", ("a process that imports", "seconds", "over nothing"), rows)
    rows = [[name, seconds] for name, seconds in results["phases_s"].items()]
    rows.append(["start of the process to first token", results["first_token_s"]])
    show(f"start with {name_of(args)}", ("phase", "seconds"), rows)
    sizes = [[name, round((results[name] or 0) / 2**20)] for name in ("peak_rss_bytes", "weight_bytes", "cache_bytes")]
    show("memory", ("", "MiB"), sizes)
    finish({"model": name_of(args), "settings": settings, "repeats": args.repeats, **results})


if __name__ == "__main__":
    main()
