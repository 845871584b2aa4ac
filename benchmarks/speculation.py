"""How much faster is decoding with speculation, and is it ever slower?

Each task runs on one engine with speculation turned on and off alternately, so that both see the same machine. Reported
are tokens per second of both and the median ratio of adjacent measurements.

  edit       one stream: a file of the standard library as the prompt, its edited version as the output. Only decoding
             counts, from the first token on.
  text       1, 8 and 32 streams that continue a file, always busy: text that repeats itself no more than other text
             does. Prefills count too.
  noise      the same with tokens sampled from the model at temperature 1: with random weights nothing ever repeats.
  draft      one stream of the small model in the package with its draft model: greedy, and at temperature 0.7.

The output of random weights cannot be drafted, and small models cannot follow an instruction, so in `edit` and `text` a
logits processor prescribes the tokens. The model computes everything as usual, on both sides; the processor costs time
at every position that is sampled or verified.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from harness.console import Step, finish, progress, show
from harness.options import add_model_options, integers, name_of, parser_for, settings_of, source_of
from harness.texts import continuations, edits, samples
from penstock import EngineConfig, InferenceEngine, SamplingParams
from penstock.demo import MODEL_DIR

EPILOG = """examples:
  python benchmarks/speculation.py
  python benchmarks/speculation.py --shape qwen3-0.6b --tasks edit,text,noise --drafter suffix
  python benchmarks/speculation.py --tasks draft --rounds 20
"""
TASKS = ("edit", "text", "noise", "draft")
NEW_TOKENS = 256
Requests = Iterator[tuple[list[int], SamplingParams]]


@dataclass(slots=True)
class Pairs:
    """Tokens per second, plain and with speculation, alternately."""

    plain: list[float] = field(default_factory=list)
    fast: list[float] = field(default_factory=list)

    def note(self, speculates: bool, rate: float) -> None:
        """Add a measurement."""
        (self.fast if speculates else self.plain).append(rate)

    def summary(self, earlier_totals: dict[str, int], totals: dict[str, int]) -> dict[str, Any]:
        """Medians, and the acceptance rate of draft tokens between two readings of the engine's totals."""
        ratios = [fast / plain for plain, fast in zip(self.plain, self.fast, strict=True)]
        drafted, accepted = (totals[name] - earlier_totals[name] for name in ("drafted_tokens", "accepted_tokens"))
        return {
            "plain_tok_s": round(median(self.plain), 2),
            "tok_s": round(median(self.fast), 2),
            "ratio": round(median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "acceptance": round(accepted / drafted, 3) if drafted else None,
        }


def turns(rounds: int) -> list[bool]:
    """Off and on, on and off, alternately."""
    return [speculates for number in range(rounds) for speculates in ((False, True) if number % 2 else (True, False))]


async def one_by_one(engine: InferenceEngine, requests: Requests, rounds: int, step: Step) -> dict[str, Any]:
    """Every request with and without speculation; decoding only."""
    pairs, earlier_totals = Pairs(), dict(engine.get_stats()["totals"])
    prompt, params = next(requests)
    for number, speculates in enumerate(turns(rounds)):
        step(f"request {number // 2 + 1}")
        engine.config.enable_speculative_decoding = speculates
        output = await engine.generate(prompt, params)
        seconds = (output.metrics.total_s or 0) - (output.metrics.first_token_s or 0)
        pairs.note(speculates, (len(output.generated_ids) - 1) / seconds)
        if number % 2:
            prompt, params = next(requests)
    return pairs.summary(earlier_totals, engine.get_stats()["totals"])


class Streams:
    """Concurrent streams, each of which starts its next request as soon as one has ended."""

    def __init__(self, engine: InferenceEngine, requests: Requests, count: int) -> None:
        self.tokens = 0
        self._engine = engine
        self._requests = requests
        self._tasks = [asyncio.create_task(self._run()) for _ in range(count)]

    async def _run(self) -> None:
        while True:
            prompt, params = next(self._requests)
            async for delta in self._engine.generate(prompt, params):
                self.tokens += len(delta.token_ids)

    async def stop(self) -> None:
        """Cancel all streams."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def together(
    engine: InferenceEngine, requests: Requests, count: int, rounds: int, seconds: float, step: Step
) -> dict[str, Any]:
    """Streams in a steady state, with and without speculation for some seconds each."""
    pairs, earlier_totals = Pairs(), dict(engine.get_stats()["totals"])
    streams = Streams(engine, requests, count)
    for number, speculates in enumerate([False, True, *turns(rounds)]):
        step(f"{count} streams, turn {number + 1}")
        engine.config.enable_speculative_decoding = speculates
        begin, tokens = time.perf_counter(), streams.tokens
        await asyncio.sleep(seconds)
        if number > 1:  # the first two fill the streams, and teach what steps cost
            pairs.note(speculates, (streams.tokens - tokens) / (time.perf_counter() - begin))
    await streams.stop()
    return pairs.summary(earlier_totals, engine.get_stats()["totals"])


def engine_of(source: str | None, settings: dict[str, Any], streams: int, **overrides: Any) -> InferenceEngine:
    """An engine with room for all streams."""
    room = {"kv_cache_tokens": max(4096, 640 * streams), "max_batch_size": max(32, streams), "enable_kv_cache": False}
    quiet = {"log_level": "ERROR", "enable_speculative_decoding": True}
    config = EngineConfig(**{**room, **quiet, **overrides, **settings})
    return InferenceEngine(source, config=config)


async def measure(args: argparse.Namespace, step: Step) -> dict[str, dict[str, Any]]:
    """The summary of every task, by name."""
    from transformers import AutoTokenizer

    source, settings, results = source_of(args), settings_of(args), dict[str, dict[str, Any]]()
    tokenizer = AutoTokenizer.from_pretrained(source)
    if "edit" in args.tasks:
        async with engine_of(source, settings, 1, drafter=args.drafter) as engine:
            results["edit"] = await one_by_one(engine, edits(tokenizer, 2 * NEW_TOKENS), args.rounds, step)
    for task in sorted({"text", "noise"} & set(args.tasks), reverse=True):
        for count in args.streams:
            requests = continuations(tokenizer, NEW_TOKENS) if task == "text" else samples(tokenizer, NEW_TOKENS, 1.0)
            async with engine_of(source, settings, count, drafter=args.drafter) as engine:
                results[f"{task}, {count}"] = await together(engine, requests, count, args.rounds, args.seconds, step)
    if "draft" in args.tasks:
        for temperature in (0.0, 0.7):
            requests = samples(AutoTokenizer.from_pretrained(MODEL_DIR), NEW_TOKENS, temperature)
            async with engine_of(None, settings, 1, drafter="draft_model") as engine:
                results[f"draft, temperature {temperature}"] = await one_by_one(engine, requests, args.rounds, step)
    return results


def tasks(text: str) -> list[str]:
    """For argparse."""
    chosen = text.split(",")
    if unknown := set(chosen) - set(TASKS):
        raise argparse.ArgumentTypeError(f"unknown task {', '.join(unknown)}: choose from {', '.join(TASKS)}")
    return chosen


def main() -> None:
    """Measure, and print the table and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser)
    parser.add_argument("--tasks", type=tasks, default=list(TASKS), metavar="T,T", help="default: all")
    parser.add_argument("--drafter", choices=("ngram", "suffix"), default="ngram", help="for all but draft (ngram)")
    parser.add_argument("--streams", type=integers, default=[1, 8, 32], metavar="N,N", help="default: 1,8,32")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="turns of each kind (default: 8)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="length of a turn (default: 2)")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    num_stream_tasks = len({"text", "noise"} & set(args.tasks)) * len(args.streams)
    singles = ("edit" in args.tasks) + 2 * ("draft" in args.tasks)
    with progress(2 * args.rounds * (num_stream_tasks + singles) + 2 * num_stream_tasks) as step:
        results = asyncio.run(measure(args, step))
    columns = ("task, streams", "plain tok/s", "tok/s", "ratio", "accepted")
    fields = ("plain_tok_s", "tok_s", "ratio", "acceptance")
    rows = [[name, *map(task.get, fields)] for name, task in results.items()]
    show(f"{name_of(args)}, {args.drafter}, medians of {args.rounds}", columns, rows)
    finish({"model": name_of(args), "drafter": args.drafter, "rounds": args.rounds, "tasks": results})


if __name__ == "__main__":
    main()
