"""How do the latencies of requests grow with the load of the engine?

Requests arrive as a Poisson process, whether or not earlier ones have finished, at several rates, each a fraction of
the engine's capacity. The capacity is measured first, by a burst of simultaneous requests. Reported per rate: time to
the first token, counted from the moment the request was due, and time per token after it; p50, p90 and p99. The same
seed gives the same pattern of arrivals at every rate, only faster.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.console import Step, finish, progress, show
from harness.engines import engine_for, vocabulary_of
from harness.options import add_model_options, name_of, numbers, parser_for, settings_of, source_of
from harness.plots import Panel, save
from harness.stats import percentiles
from peers.workloads import WARM_UP, Work, Workload, limits
from penstock import InferenceEngine, SamplingParams
from penstock.cli.workloads import poisson_arrivals
from penstock.errors import PenstockError

EPILOG = """examples:
  python benchmarks/latency.py
  python benchmarks/latency.py --shape qwen3-0.6b --loads 0.3,0.6,0.9 --requests 60 --plot latency.png
  python benchmarks/latency.py --model ./my-model --rates 0.5,1,2 --prompt 256 --output 128

--loads are fractions of the measured capacity, --rates requests per second.
"""
QUANTILES = ("p50", "p90", "p99")


@dataclass(slots=True)
class Waits:
    """Seconds until the first token of each request, and per later token. `refused` requests ended with an error."""

    first_s: list[float] = field(default_factory=list)
    later_s: list[float] = field(default_factory=list)
    tokens: int = 0
    refused: int = 0


async def read(engine: InferenceEngine, prompt: list[int], count: int, due_s: float, waits: Waits) -> None:
    """Send a request when it is due, on the clock of `time.perf_counter`, and record when its tokens arrive."""
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    previous_s, num_tokens = due_s, 0
    try:
        async for delta in engine.generate(prompt, params):
            now, num_new = time.perf_counter(), len(delta.token_ids)
            if num_tokens == 0 and num_new:
                waits.first_s.append(now - previous_s)
            elif num_new:
                waits.later_s += [(now - previous_s) / num_new] * num_new
            previous_s, num_tokens = (now, num_tokens + num_new) if num_new else (previous_s, num_tokens)
    except PenstockError:
        waits.refused += 1
    waits.tokens += num_tokens


async def offer(engine: InferenceEngine, work: Work, arrivals_s: list[float]) -> tuple[Waits, float]:
    """What the readers measured, and the total time in seconds."""
    waits, begin = Waits(), time.perf_counter()
    requests = zip(work, arrivals_s, strict=True)
    await asyncio.gather(*(read(engine, ids, count, begin + at, waits) for (ids, count), at in requests))
    return waits, time.perf_counter() - begin


def point(rate: float, capacity: float, waits: Waits, seconds: float) -> dict[str, Any]:
    """The results of one rate as plain data; times in milliseconds."""
    return {
        "requests_per_s": round(rate, 4),
        "load": round(rate / capacity, 3),
        "completed": len(waits.first_s),
        "refused": waits.refused,
        "output_tok_s": round(waits.tokens / seconds, 1),
        "first_token_ms": percentiles([1000 * value for value in waits.first_s]),
        "inter_token_ms": percentiles([1000 * value for value in waits.later_s]),
    }


async def measure(engine: InferenceEngine, args: argparse.Namespace, vocab_size: int, step: Step) -> dict[str, Any]:
    """Capacity in requests per second, and a point per rate."""
    burst, kind = Workload("burst", args.burst, 0, args.prompt, args.output), "latency"
    async with engine:
        step("capacity")
        await offer(engine, WARM_UP.draw(0, vocab_size), [0.0] * WARM_UP.requests)
        _, took = await offer(engine, burst.draw(0, vocab_size), [0.0] * args.burst)
        capacity, points = args.burst / took, []
        for turn, rate in enumerate(args.rates or [load * capacity for load in args.loads]):
            step(f"{rate:.2f} requests/s, load {rate / capacity:.2f}")
            work = Workload(kind, args.requests, 0, args.prompt, args.output).draw(turn, vocab_size)
            waits, took = await offer(engine, work, poisson_arrivals(rate, args.requests, args.seed))
            points.append(point(rate, capacity, waits, took))
    return {"capacity_requests_per_s": round(capacity, 4), "points": points}


def panels(points: list[dict[str, Any]]) -> list[Panel]:
    """Both latencies over the load."""

    def curves(name: str) -> dict[str, list[tuple[float, float]]]:
        return {q: [(p["load"], p[name][q]) for p in points if p[name]] for q in QUANTILES}

    x = "offered load, fraction of capacity"
    return [
        Panel("time to first token", x, "ms", curves("first_token_ms")),
        Panel("time per later token", x, "ms", curves("inter_token_ms")),
    ]


def main() -> None:
    """Measure, and print a table, the plot and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser)
    load = parser.add_argument_group("load")
    load.add_argument("--loads", type=numbers, metavar="F,F", default=[0.2, 0.4, 0.6, 0.8, 0.95], help="fractions")
    load.add_argument("--rates", type=numbers, metavar="R,R", help="requests per second, in place of --loads")
    load.add_argument("--requests", type=int, metavar="N", default=60, help="per rate (default: 60)")
    load.add_argument("--burst", type=int, metavar="N", default=32, help="requests that measure capacity (default: 32)")
    load.add_argument("--prompt", type=int, metavar="N", default=128, help="tokens of a prompt (default: 128)")
    load.add_argument("--output", type=int, metavar="N", default=32, help="new tokens of a request (default: 32)")
    load.add_argument("--seed", type=int, metavar="S", default=0, help="of the arrivals (default: 0)")
    parser.add_argument("--plot", type=Path, metavar="FILE", default=Path("latency.png"), help="default: latency.png")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    source, settings = source_of(args), settings_of(args)
    # Any number of requests may be under way at once; the cache has room for a full batch and they queue beyond it.
    engine = engine_for(source, settings, limits([Workload("most", args.burst, 0, args.prompt, args.output)]))
    with progress(1 + len(args.rates or args.loads)) as step:
        result = asyncio.run(measure(engine, args, vocabulary_of(source), step))
    columns = ("load", "requests/s", "tok/s", *(f"{token} {q} ms" for token in ("first", "later") for q in QUANTILES))
    rows = [
        [cells["load"], cells["requests_per_s"], cells["output_tok_s"]]
        + [(cells[kind] or {}).get(q) for kind in ("first_token_ms", "inter_token_ms") for q in QUANTILES]
        for cells in result["points"]
    ]
    show(f"{name_of(args)}, {args.prompt} + {args.output} tokens per request", columns, rows)
    plot = save(args.plot, panels(result["points"]))
    finish({"model": name_of(args), "settings": settings, "plot": plot, **result})


if __name__ == "__main__":
    main()
