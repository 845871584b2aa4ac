"""How much of the prompts do replicas find in their caches, and what does that save, compared with taking turns?

prefix        a request goes to the replica that has computed most of its prompt, unless that is busier by far
load          to the least loaded replica
round_robin   to each replica in turn

Conversations, each with a system prompt of its own, take their turns at once; a turn sends all of the conversation so
far. The cache of a replica holds its share of the conversations, and so not all of them. `hit rate` is the share of
prompt tokens found in the caches, `balance` the requests of the replica that got most, over the mean. CPU seconds are
those of the process, which other programs disturb less than the clock. The ways take turns; medians are shown.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from statistics import median
from typing import Any

from harness.console import Step, finish, progress, show
from harness.engines import vocabulary_of
from harness.options import add_model_options, name_of, parser_for, settings_of, source_of
from penstock import ReplicatedEngine, SamplingParams

EPILOG = """examples:
  python benchmarks/replicas.py
  python benchmarks/replicas.py --shape qwen3-0.6b --replicas 2 --conversations 8 --system 256
"""
WAYS = ("prefix", "load", "round_robin")
SPARE = 1.25  # the cache of all replicas together, over what all conversations need


async def converse(engine: ReplicatedEngine, rng: random.Random, vocab_size: int, args: argparse.Namespace) -> None:
    """One conversation: every turn waits for the answer to the one before."""
    params = SamplingParams(temperature=0.0, max_tokens=args.answer, ignore_eos=True, detokenize=False)
    history = [rng.randrange(5, vocab_size) for _ in range(args.system)]
    for _ in range(args.turns):
        history += [rng.randrange(5, vocab_size) for _ in range(args.question)]
        history += (await engine.generate(list(history), params)).generated_ids


def cache_tokens(args: argparse.Namespace) -> int:
    """Tokens of each replica's cache."""
    longest = args.system + args.turns * (args.question + args.answer)
    return int(SPARE * longest * args.conversations / args.replicas)


async def measure(source: str, routing: str, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """All conversations on fresh replicas."""
    quiet = {"skip_tokenizer_init": True, "log_level": "ERROR", "batch_timeout_ms": 0}
    sizes = {"kv_cache_tokens": cache_tokens(args), "enable_speculative_decoding": False}
    options: dict[str, Any] = {**quiet, **sizes, "device": "cpu", **settings}
    vocab_size = vocabulary_of(source)
    async with ReplicatedEngine(source, replicas=args.replicas, routing=routing, **options) as engine:  # type: ignore[arg-type]
        begin, cpu_begin = time.perf_counter(), time.process_time()
        rngs = [random.Random(number) for number in range(args.conversations)]
        await asyncio.gather(*(converse(engine, rng, vocab_size, args) for rng in rngs))
        seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_begin
        stats = engine.get_stats()
    counts = [replica["num_requests"] for replica in stats["routing"]]
    return {
        "hit rate": stats["cache_info"]["hit_rate"],
        "balance": max(counts) * len(counts) / sum(counts),
        "tokens/s": stats["totals"]["generated_tokens"] / seconds,
        "CPU s": cpu_s,
    }


async def compare(source: str, settings: dict[str, Any], args: argparse.Namespace, step: Step) -> dict[str, Any]:
    """Medians of every way."""
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(args.repeats):
        for way in WAYS:
            step(f"{way}, run {number + 1}")
            runs[way].append(await measure(source, way, settings, args))
    return {way: {name: median(run[name] for run in runs[way]) for name in runs[way][0]} for way in WAYS}


def main() -> None:
    """Measure, and print the table and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser)
    parser.add_argument("--replicas", type=int, default=2, help="replicas on the CPU (default: 2)")
    parser.add_argument("--conversations", type=int, default=24, help="at once (default: 24)")
    parser.add_argument("--turns", type=int, default=6, help="of each conversation (default: 6)")
    parser.add_argument("--system", type=int, default=512, help="tokens of its system prompt (default: 512)")
    parser.add_argument("--question", type=int, default=32, help="tokens of a turn's question (default: 32)")
    parser.add_argument("--answer", type=int, default=16, help="tokens of its answer (default: 16)")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions; medians are shown (default: 3)")
    args = parser.parse_args()
    source, settings = source_of(args), settings_of(args)
    with progress(args.repeats * len(WAYS)) as step:
        figures = asyncio.run(compare(source, settings, args, step))
    columns = ("routing", *next(iter(figures.values())))
    show(
        f"{name_of(args)}, {args.replicas} replicas, {args.conversations} conversations of {args.turns} turns",
        columns,
        [[way, *row.values()] for way, row in figures.items()],
    )
    finish({"model": name_of(args), "replicas": args.replicas, "ways": figures})


if __name__ == "__main__":
    main()
