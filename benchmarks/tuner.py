"""Does the tuned engine keep its latency bound, and does it reach the throughput of limits set by hand?

--goal latency: a few streams run all the time while long prompts keep arriving. The time between two tokens of the
streams is measured untuned and with target="latency": its p99 should be below the bound. The waiting time of the
prompts is reported too. --goal throughput: many concurrent requests, with several batch and step sizes set by hand, and
with target="throughput" without any: it should reach 0.95 of the best. Each run has a fresh engine.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from harness.console import finish, progress, show
from harness.engines import vocabulary_of
from harness.options import add_model_options, integers, name_of, parser_for, settings_of, source_of
from harness.plots import Panel, save
from harness.stats import percentile, percentiles
from peers.workloads import BLOCK, WARM_UP, Workload
from penstock import InferenceEngine, SamplingParams

EPILOG = """examples:
  python benchmarks/tuner.py --shape qwen3-0.6b
  python benchmarks/tuner.py --shape qwen3-0.6b --goal latency --bound 60 --seconds 40 --runs tuned
  python benchmarks/tuner.py --shape qwen3-0.6b --goal throughput --rows 16,64 --budgets 512,2048
"""
STREAM_TOKENS, STREAM_PROMPT, ANSWER = 1000, 64, 8


@dataclass(slots=True)
class Waits:
    """Times of the readers: (arrival, gap) of each token of a stream, and first tokens of prompts."""

    between_s: list[tuple[float, float]] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)


def params(new_tokens: int) -> SamplingParams:
    """Greedy, without a stop at EOS."""
    return SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)


def ids_of(number: int, count: int, vocab_size: int) -> list[int]:
    """A prompt that shares no prefix with others."""
    return Workload(f"prompt {number}", 1, 0, count, 1).draw(number, vocab_size)[0][0]


async def stream(engine: InferenceEngine, prompt: list[int], begin: float, waits: Waits) -> None:
    """Read one request after the other and record the time between the tokens of each."""
    while True:
        previous_s = None
        async for delta in engine.generate(prompt, params(STREAM_TOKENS)):
            now, num_new = time.perf_counter(), len(delta.token_ids)
            if previous_s is not None and num_new:
                waits.between_s += [(now - begin, (now - previous_s) / num_new)] * num_new
            previous_s = now


async def prompt_due(engine: InferenceEngine, prompt: list[int], due_s: float, waits: Waits) -> None:
    """Send a prompt when it is due and record when its first token arrives."""
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    async for delta in engine.generate(prompt, params(ANSWER)):
        if delta.token_ids:
            waits.first_s.append(time.perf_counter() - due_s)
            break


async def latency_run(source: str, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Streams and prompts for a while; times in milliseconds."""
    vocab_size, waits = vocabulary_of(source), Waits()
    arrivals = [args.every * (turn + 0.25) for turn in range(int(args.seconds / args.every))]
    # Every stream and every prompt has room in the cache, so that requests only wait for the model.
    tokens = args.streams * (STREAM_PROMPT + STREAM_TOKENS) + len(arrivals) * (args.prompt + 2 * BLOCK)
    room = {"max_sequence_length": max(args.prompt, STREAM_TOKENS) + 100, "kv_cache_tokens": tokens}
    async with engine_of(source, {**room, **settings}) as engine:
        await warm_up(engine, vocab_size)
        begin = time.perf_counter()
        streams = [
            asyncio.create_task(stream(engine, ids_of(i, STREAM_PROMPT, vocab_size), begin, waits))
            for i in range(args.streams)
        ]
        prompts = [
            asyncio.create_task(prompt_due(engine, ids_of(100 + i, args.prompt, vocab_size), begin + due_s, waits))
            for i, due_s in enumerate(arrivals)
        ]
        await asyncio.sleep(args.seconds)
        for task in (*streams, *prompts):
            task.cancel()
        await asyncio.gather(*streams, *prompts, return_exceptions=True)
        tuner = engine.get_stats()["tuner"]
    waited = [1000 * seconds for _, seconds in waits.between_s]
    return {
        "inter_token_ms": {**(percentiles(waited) or {}), "p99.9": round(percentile(waited, 99.9), 3)},
        "above_bound": round(sum(wait > args.bound for wait in waited) / len(waited), 5),
        "tokens": len(waited),
        "prompts": len(arrivals),
        "prompts_answered": len(waits.first_s),
        "first_token_ms": percentiles([1000 * seconds for seconds in waits.first_s]),
        "limits": tuner.get("limits"),
        "reason": tuner.get("reason"),
        "changes": len(tuner.get("changes", ())),
        "curve": worst_by_second(waits.between_s),
    }


def worst_by_second(between_s: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The longest wait of each second, in milliseconds."""
    worst: dict[int, float] = {}
    for at, seconds in between_s:
        worst[int(at)] = max(worst.get(int(at), 0.0), 1000 * seconds)
    return [(float(second), round(ms, 2)) for second, ms in sorted(worst.items())]


async def throughput_run(source: str, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """All requests at once; output tokens per second."""
    vocab_size = vocabulary_of(source)
    work = Workload("tuner", args.requests, 0, args.prompt_each, args.output).draw(0, vocab_size)
    length = args.prompt_each + args.output
    room = {"kv_cache_tokens": args.requests * (length + 2 * BLOCK)}
    async with engine_of(source, {**room, **settings}) as engine:
        await warm_up(engine, vocab_size)
        begin = time.perf_counter()
        await asyncio.gather(*(engine.generate(ids, params(count)) for ids, count in work))
        seconds = time.perf_counter() - begin
        tuner = engine.get_stats()["tuner"]
    return {
        "output_tok_s": round(args.requests * args.output / seconds, 2),
        "seconds": round(seconds, 2),
        "limits": tuner.get("limits"),
        "changes": tuner.get("changes"),
    }


def engine_of(source: str, settings: dict[str, Any]) -> InferenceEngine:
    """An engine on token ids, whose memory is touched at the start."""
    quiet = {"skip_tokenizer_init": True, "log_level": "ERROR", "preallocate_kv_cache": True}
    return InferenceEngine(source, **{**quiet, **settings})


async def warm_up(engine: InferenceEngine, vocab_size: int) -> None:
    """Run the requests that pay the one-time costs."""
    await asyncio.gather(*(engine.generate(ids, params(count)) for ids, count in WARM_UP.draw(0, vocab_size)))


def latency(source: str, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Untuned and tuned, one after the other."""
    runs = {"untuned": {}, "tuned": {"target": "latency", "max_inter_token_ms": args.bound}}
    results = {}
    with progress(len(args.runs)) as step:
        for name in args.runs:
            step(f"latency, {name}")
            results[name] = asyncio.run(latency_run(source, {**settings, **runs[name]}, args))
    rows = [
        [
            name,
            *(run["inter_token_ms"][q] for q in ("p50", "p99", "p99.9")),
            run["above_bound"],
            run["prompts_answered"],
            (run["first_token_ms"] or {}).get("p50"),
        ]
        for name, run in results.items()
    ]
    columns = ("", "inter-token p50 ms", "p99", "p99.9", "above the bound", "prompts answered", "first token p50 ms")
    title = f"{name_of(args)}: {args.streams} streams, a prompt of {args.prompt} tokens every {args.every:g} s"
    show(f"{title}, bound {args.bound:g} ms", columns, rows)
    return results


def throughput(source: str, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """All limits set by hand, and the tuner."""
    runs: dict[str, dict[str, Any]] = {
        f"{rows} rows, {budget} tokens": {"max_batch_size": rows, "max_num_batched_tokens": budget}
        for rows, budget in product(args.rows, args.budgets)
    }
    runs["tuned"] = {"target": "throughput"}
    results = {}
    with progress(len(runs)) as step:
        for name, chosen in runs.items():
            step(f"throughput, {name}")
            results[name] = asyncio.run(throughput_run(source, {**settings, **chosen}, args))
    best = max((run["output_tok_s"] for name, run in results.items() if name != "tuned"), default=None)
    rows = [[name, run["output_tok_s"], run["output_tok_s"] / best if best else None] for name, run in results.items()]
    title = f"{name_of(args)}: {args.requests} requests of {args.prompt_each} + {args.output} tokens"
    show(title, ("", "output tokens/s", "of the best by hand"), rows)
    return results


def panels(results: dict[str, Any], bound: float) -> list[Panel]:
    """The longest waits over time, and rates by rows."""
    plots = []
    if "latency" in results:
        curves = {name: run["curve"] for name, run in results["latency"].items()}
        ends = [point[0] for curve in curves.values() for point in curve]
        curves["bound"] = [(min(ends), bound), (max(ends), bound)]
        plots.append(Panel("longest wait between tokens, by second", "s", "ms", curves))
    if "throughput" in results:
        rates = {name: [(x, run["output_tok_s"]) for x in (0.0, 1.0)] for name, run in results["throughput"].items()}
        plots.append(Panel("throughput", "", "output tokens/s", rates))
    return plots


def main() -> None:
    """Measure, and print the tables, the plot and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser)
    parser.add_argument("--goal", choices=("latency", "throughput", "both"), default="both", help="default: both")
    group = parser.add_argument_group("latency")
    group.add_argument("--bound", type=float, metavar="MS", default=60.0, help="between tokens (default: 60)")
    group.add_argument("--seconds", type=float, metavar="S", default=45.0, help="of each run (default: 45)")
    group.add_argument("--streams", type=int, metavar="N", default=2, help="that run all the time (default: 2)")
    group.add_argument("--prompt", type=int, metavar="N", default=2000, help="tokens of a prompt (default: 2000)")
    group.add_argument("--every", type=float, metavar="S", default=10.0, help="seconds between prompts (default: 10)")
    group.add_argument("--runs", type=lambda text: text.split(","), default=["untuned", "tuned"], help="which of both")
    group = parser.add_argument_group("throughput")
    group.add_argument("--requests", type=int, metavar="N", default=64, help="at once (default: 64)")
    group.add_argument("--prompt-each", type=int, metavar="N", default=128, help="tokens (default: 128)")
    group.add_argument("--output", type=int, metavar="N", default=48, help="new tokens (default: 48)")
    group.add_argument("--rows", type=integers, metavar="N,N", default=[16, 32, 64], help="batch limits by hand")
    group.add_argument("--budgets", type=integers, metavar="N,N", default=[512, 2048], help="tokens of a step by hand")
    parser.add_argument("--plot", type=Path, metavar="FILE", default=Path("tuner.png"), help="default: tuner.png")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    source, settings = source_of(args), settings_of(args)
    results = {}
    if args.goal in ("latency", "both"):
        results["latency"] = latency(source, settings, args)
    if args.goal in ("throughput", "both"):
        results["throughput"] = throughput(source, settings, args)
    plot = save(args.plot, panels(results, args.bound))
    finish({"model": name_of(args), "settings": settings, "bound_ms": args.bound, "plot": plot, **results})


if __name__ == "__main__":
    main()
