"""Does the engine keep the usual promises of an inference engine, compared with plain transformers on the same model?

Five promises, each measured on both sides alternately in one process: time to the first token, tokens per second, the
fraction of time in which the model is busy, the memory of keys and values, and the gain of speculation, which is
relative to this engine without it. Plain transformers means `generate`, one request after the other, and one batch
padded to its longest row. Random token ids and greedy sampling unless stated otherwise; medians over the repeats.

--report writes the table into a section of docs/performance.md, one for each model.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from harness.console import Step, finish, note, progress, show
from harness.engines import engine_for, vocabulary_of
from harness.options import add_model_options, name_of, parser_for, settings_of, source_of
from harness.report import markdown_table
from harness.sections import replaced
from harness.texts import edits, samples
from peers.workloads import WARM_UP, WORKLOADS, Workload, limits
from penstock import EngineConfig, InferenceEngine
from penstock.cli.measurements import Measurements, measure_engine
from penstock.demo import MODEL_DIR
from penstock.models.baseline import Baseline, load_module
from speculation import NEW_TOKENS, engine_of, one_by_one

EPILOG = """examples:
  python benchmarks/headline.py
  python benchmarks/headline.py --shape qwen3-0.6b --repeats 1 --alone 2 --report docs/performance.md
"""
FIRST = Workload("first", 1, 0, 512, 1)
CROWD = Workload("crowd", 8, 0, 128, 16)
RAGGED, PREFIX = WORKLOADS["ragged32"], WORKLOADS["prefix32"]
Work = list[tuple[list[int], int]]
Draw = Callable[[Workload, int], Work]
Results = dict[str, tuple[float, float]]
MS, MIB = 1000.0, 2**20


class Watched:
    """A `Baseline` whose forward passes are timed: (start, end) of each, in seconds."""

    def __init__(self, module: Any) -> None:
        self.spans: list[tuple[float, float]] = []
        self._baseline = Baseline(module)
        self._module, self._forward = module, module.forward
        module.forward = self._timed

    def _timed(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self._forward(*args, **kwargs)
        finally:
            self.spans.append((begin, time.perf_counter()))

    def run(self, work: Work) -> tuple[float, float, float]:
        """One batch: start, end of the first pass (which gives the first tokens), end of the batch."""
        self.spans.clear()
        begin = time.perf_counter()
        self._baseline.generate(work)
        return begin, self.spans[0][1], time.perf_counter()

    def one_by_one(self, work: Work) -> tuple[list[float], float]:
        """Requests that arrive at once, run one after the other: seconds to each first token, and in total."""
        runs = [self.run([request]) for request in work]
        return [first_s - runs[0][0] for _, first_s, _ in runs], runs[-1][2] - runs[0][0]

    def busy(self) -> float:
        """Seconds within the model of the last batch."""
        return sum(end - begin for begin, end in self.spans)

    def close(self) -> None:
        """Restore the module."""
        del self._module.forward


def token_bytes(module: Any) -> int:
    """Bytes of keys and values of one token, as transformers holds them."""
    import torch

    with torch.inference_mode():
        cache = module(torch.tensor([[5]]), use_cache=True).past_key_values
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def padded_tokens(work: Work) -> int:
    """Tokens in the cache of a padded batch at its end; the last one of each row is never stored."""
    return len(work) * (max(len(prompt) for prompt, _ in work) + max(count for _, count in work) - 1)


async def held_tokens(engine: InferenceEngine, work: Work) -> int:
    """The maximum number of tokens for which the engine's running requests hold blocks during the same work."""
    measuring, max_blocks = asyncio.ensure_future(measure_engine(engine, work, Measurements())), 0
    while not measuring.done():
        cache = engine.get_stats()["cache_info"]
        max_blocks = max(max_blocks, cache["num_blocks"] - cache["num_free_blocks"])
        await asyncio.sleep(0.002)
    await measuring
    return max_blocks * engine.config.block_size


def busy_s(engine: InferenceEngine) -> float:
    """Seconds of the engine's latest steps, each from the end of the one before it, so planning is included."""
    steps = engine.get_stats()["performance_metrics"].get("batch_processing_time", {"mean": 0.0, "count": 0})
    return float(steps["mean"] * steps["count"])


async def waits(watched: Watched, engine: InferenceEngine, draw: Draw, args: argparse.Namespace) -> Results:
    """Seconds until the first token of a single request, and of eight that arrive at once (median)."""
    results: dict[str, list[tuple[float, float]]] = {"first": [], "crowd": []}
    for repeat in range(args.repeats):
        for workload in (FIRST, CROWD):
            work, figures = draw(workload, repeat), Measurements()
            firsts, _ = watched.one_by_one(work)
            await measure_engine(engine, work, figures)
            results[workload.name].append((median(firsts), median(figures.first_token_s)))
    return {name: medians(pairs) for name, pairs in results.items()}


async def rates(watched: Watched, engine: InferenceEngine, draw: Draw, args: argparse.Namespace) -> Results:
    """Tokens per second of 32 ragged requests, and the fraction of the time in which the model ran."""
    alone, padded, busy = [], [], []
    for repeat in range(args.repeats):
        work, figures = draw(RAGGED, repeat), Measurements()
        tokens = sum(count for _, count in work)
        requests = work[: args.alone]
        _, alone_s = watched.one_by_one(requests)
        begin, _, end = watched.run(work)
        before = busy_s(engine)
        await measure_engine(engine, work, figures)
        ours_s = figures.engine_s[0]
        alone.append((sum(count for _, count in requests) / alone_s, tokens / ours_s))
        padded.append((tokens / (end - begin), tokens / ours_s))
        busy.append((watched.busy() / (end - begin), (busy_s(engine) - before) / ours_s))
    return {"alone": medians(alone), "padded": medians(padded), "busy": medians(busy)}


async def speculation(source: str, settings: dict[str, Any], rounds: int, step: Step) -> Results:
    """Tokens per second of one stream without and with speculation: an edited file; the package's draft model."""
    from transformers import AutoTokenizer

    results = {}
    tokenizer = AutoTokenizer.from_pretrained(source)
    async with engine_of(source, settings, 1) as engine:
        pairs = await one_by_one(engine, edits(tokenizer, NEW_TOKENS), rounds, step)
        results["edit"] = (pairs["plain_tok_s"], pairs["tok_s"])
    if source == str(MODEL_DIR):
        async with engine_of(None, settings, 1, drafter="draft_model") as engine:
            pairs = await one_by_one(engine, samples(tokenizer, NEW_TOKENS, 0.0), rounds, step)
            results["draft"] = (pairs["plain_tok_s"], pairs["tok_s"])
    return results


def useful(work: Work) -> float:
    """The fraction of a padded batch's positions that hold a token."""
    return sum(len(prompt) + count - 1 for prompt, count in work) / padded_tokens(work)


async def memory(module: Any, engine: InferenceEngine, draw: Draw) -> Results:
    """Bytes of keys and values for 32 ragged requests, and for 32 that share their first 512 tokens."""
    results, bytes_per_token = {}, token_bytes(module)
    for workload in (RAGGED, PREFIX):
        work = draw(workload, 0)
        ours = await held_tokens(engine, work)
        results[workload.name] = (float(bytes_per_token * padded_tokens(work)), float(bytes_per_token * ours))
    return results


def medians(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """The median of each side."""
    theirs, ours = zip(*pairs, strict=True)
    return median(theirs), median(ours)


async def promises(module: Any, source: str, settings: dict[str, Any], args: argparse.Namespace, step: Step) -> Results:
    """(plain transformers, this engine) by promise."""
    watched, size = Watched(module), vocabulary_of(source)

    def draw(workload: Workload, repeat: int) -> Work:
        return workload.draw(repeat, size)

    fresh = {"enable_kv_cache": False, "preallocate_kv_cache": True, "batch_timeout_ms": 0, **settings}
    async with engine_for(source, fresh, limits([FIRST, CROWD, RAGGED, PREFIX])) as engine:
        watched.run(draw(WARM_UP, 0))
        await measure_engine(engine, draw(WARM_UP, 0), Measurements())
        step("first tokens")
        results = await waits(watched, engine, draw, args)
        step("tokens per second")
        results |= await rates(watched, engine, draw, args)
        results["useful"] = (useful(draw(RAGGED, 0)), 1.0)
    step("memory")
    async with engine_for(source, settings, limits([RAGGED, PREFIX])) as engine:  # prefixes are shared
        return results | await memory(module, engine, draw)


# Measured -> (row of the table, what is promised elsewhere, factor to the unit, unit, whether less is better).
ROWS: Mapping[str, tuple[str, str, float, str, bool]] = {
    "first": ("First token, 512 prompt tokens", "under 50 ms, 2.7x", MS, "ms", True),
    "crowd": ("First token, 8 requests of 128 + 16 at once, median", "", MS, "ms", True),
    "alone": ("Throughput, against one request at a time", "over 1,000 tok/s, 3x", 1.0, "tok/s", False),
    "padded": ("Throughput, against a padded batch", "over 1,000 tok/s, 3x", 1.0, "tok/s", False),
    "edit": ("Speculation from the text, an edited file; against none", "4x", 1.0, "tok/s", False),
    "draft": ("Speculation with a draft model, greedy; against none", "4x", 1.0, "tok/s", False),
    "busy": ("Fraction of the time in which the model runs; ours with planning", "over 90%, 1.4x", 100.0, "%", False),
    "useful": ("Fraction of computed positions that are not padding", "", 100.0, "%", False),
    "ragged32": ("K/V of 32 requests of mixed lengths", "a quarter", 1 / MIB, "MiB", True),
    "prefix32": ("K/V of 32 requests that share 512 tokens", "a quarter", 1 / MIB, "MiB", True),
}


def row(name: str, pair: tuple[float, float]) -> list[object]:
    """One line of the table."""
    title, promised, factor, unit, is_lower_better = ROWS[name]
    theirs, ours = (value * factor for value in pair)
    return [title, promised, unit, theirs, ours, (theirs / ours if is_lower_better else ours / theirs)]


COLUMNS = ("promise", "elsewhere", "unit", "transformers", "penstock", "times better")


def document(model: str, rows: list[list[object]], command: str) -> str:
    """The section of the report."""
    return (
        f"## The usual promises, on {model}\n\n"
        "What inference engines promise (here: of a 7B model on an A100), measured on the machine above against plain\n"
        "`transformers` on the same weights, alternately in one process. Speculation is compared with this engine\n"
        "without it.\n\n"
        f"{markdown_table(COLUMNS, rows)}\n"
        f"```\n{command}\n```\n"
    )


def command(args: argparse.Namespace) -> str:
    """The command that repeats the measurement."""
    model = f" --model {args.model}" if args.model else f" --shape {args.shape}" if args.shape else ""
    return f"python benchmarks/headline.py{model} --repeats {args.repeats} --alone {args.alone}"


def main() -> None:
    """Measure, and print the tables and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="medians are over these (default: 3)")
    parser.add_argument("--alone", type=int, default=8, metavar="N", help="requests that run one by one (default: 8)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a section of docs/performance.md")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    source, settings, name = source_of(args), settings_of(args), name_of(args)
    module = load_module(source, EngineConfig(**{key: settings[key] for key in ("dtype",) if key in settings}))
    with progress(3 + (4 if source == str(MODEL_DIR) else 2) * args.repeats) as step:
        results = asyncio.run(promises(module, source, settings, args, step))
        results |= asyncio.run(speculation(source, settings, args.repeats, step))
    rows = [row(key, results[key]) for key in ROWS if key in results]
    show(f"{name}, medians of {args.repeats}", COLUMNS, rows)
    if args.report:
        text = args.report.read_text(encoding="utf-8") if args.report.exists() else ""
        section = document(name, rows, command(args))
        args.report.write_text(replaced(text, f"headline {name}", section), encoding="utf-8")
        note(f"report: {args.report}")
    finish({"model": name, "repeats": args.repeats, "promises": results})


if __name__ == "__main__":
    main()
