"""The workloads of all engines and their measurement: random token ids, greedy, no stop at EOS, so that every engine
does exactly the same work. The requests are those of `penstock bench`, id by id.

Standard library only, because each engine's runner imports this in an environment of its own. Never imports an engine.
Called by the `run_*.py` beside it and by the benchmarks one folder up.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

# The prompt's token ids and the number of new tokens of each request.
Work = Sequence[tuple[list[int], int]]
# Runs all requests of one workload concurrently; returns the new token ids of each.
Run = Callable[[Work], Sequence[Sequence[int]]]
LOWEST_ID, HIGHEST_ID = 3, 7000
BLOCK = 16  # K/V caches are counted in blocks of at most this many tokens
BORN = time.perf_counter()


@dataclass(frozen=True, slots=True)
class Workload:
    """Tokens per request: a `shared` prefix, `unique` ones, `output` new ones; `ragged`: from 1/8 of both up."""

    name: str
    requests: int
    shared: int
    unique: int
    output: int
    ragged: bool = False

    def draw(self, repeat: int, vocab_size: int) -> list[tuple[list[int], int]]:
        """The requests of one repeat: the same lengths in all repeats, but other ids."""
        lengths, ids = random.Random(self.name), random.Random(f"{self.name}/{repeat}")
        prefix = _ids(ids, self.shared, vocab_size)
        sizes = [(self._size(lengths, self.unique), self._size(lengths, self.output)) for _ in range(self.requests)]
        return [(prefix + _ids(ids, unique, vocab_size), output) for unique, output in sizes]

    def _size(self, rng: random.Random, size: int) -> int:
        return rng.randint(max(1, size // 8), size) if self.ragged else size


def _ids(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    high = min(vocab_size, HIGHEST_ID)
    low = min(LOWEST_ID, high - 1)
    return [rng.randrange(low, high) for _ in range(count)]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("single", 1, 0, 16, 64),
        Workload("prefill", 1, 0, 512, 1),
        Workload("batch8", 8, 0, 128, 64),
        Workload("batch32", 32, 0, 128, 64),
        Workload("ragged32", 32, 0, 256, 96, ragged=True),
        Workload("prefix32", 32, 512, 32, 32),
    )
}
WARM_UP = Workload("warm-up", 2, 0, 32, 8)


def parse(text: str) -> list[Workload]:
    """Workloads of a comma-separated list: names, or `8x128+64` for 8 requests of 128 + 64 tokens.

    Raises `argparse.ArgumentTypeError`.
    """
    return [_parse_one(name.strip()) for name in text.split(",") if name.strip()]


def _parse_one(name: str) -> Workload:
    if name in WORKLOADS:
        return WORKLOADS[name]
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", name)
    if not sizes:
        names = ", ".join(WORKLOADS)
        raise argparse.ArgumentTypeError(f"there is no workload {name!r}: choose from {names}, or write 8x128+64")
    requests, unique, output = map(int, sizes.groups())
    return Workload(name, requests, 0, unique, output)


@dataclass(frozen=True, slots=True)
class Limits:
    """The room that an engine needs: concurrent requests, tokens of the longest one, tokens of all together."""

    requests: int
    longest: int
    tokens: int


def limits(workloads: Sequence[Workload]) -> Limits:
    """The room for the largest of some workloads and the warm-up; shared prefixes count for every request."""
    workloads = [*workloads, WARM_UP]
    lengths = [workload.shared + workload.unique + workload.output for workload in workloads]
    tokens = [w.requests * (-(-length // BLOCK) + 1) * BLOCK for w, length in zip(workloads, lengths, strict=True)]
    return Limits(max(workload.requests for workload in workloads), max(lengths), max(tokens))


def shared_tokens(work: Work) -> int:
    """The length of the prompts' common prefix; 0 for a single prompt."""
    if len(work) < 2:
        return 0
    columns = zip(*(ids for ids, _ in work), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def vocabulary(folder: str | Path) -> int:
    """The vocabulary size of the model in a folder."""
    config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return int(config.get("text_config", config)["vocab_size"])


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The command line of every runner."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Prints JSON lines: kind load (load_s counts from the start of this script, imports included), one of\n"
        "kind rate per workload (medians over the repeats), and kind memory.",
    )
    parser.add_argument("model", help="folder of the model, with a config.json")
    parser.add_argument(
        "--workloads",
        type=parse,
        metavar="W,W",
        default=list(WORKLOADS.values()),
        help=f"{', '.join(WORKLOADS)} (default: all), or sizes like 8x128+64",
    )
    parser.add_argument("--repeats", type=int, metavar="N", default=3, help="repeats for the median (default: 3)")
    return parser


def measure(load: Callable[[Limits], Run], args: argparse.Namespace, begin: float = BORN) -> None:
    """Load an engine, warm it up, and print its results on every workload as JSON lines."""
    run = load(limits(args.workloads))
    _print(kind="load", load_s=round(time.perf_counter() - begin, 2))
    vocab_size = vocabulary(args.model)
    run(WARM_UP.draw(0, vocab_size))
    for workload in args.workloads:
        works = [workload.draw(repeat, vocab_size) for repeat in range(args.repeats)]
        _print(**rate(workload.name, works[0], [_seconds(run, work) for work in works]))
    _print(kind="memory", peak_rss_bytes=peak_rss_bytes())


def rate(name: str, work: Work, seconds: Sequence[float]) -> dict[str, Any]:
    """The record of one workload."""
    median_s, output = median(seconds), sum(count for _, count in work)
    prompt = sum(len(ids) for ids, _ in work)
    return {
        "kind": "rate",
        "workload": name,
        "requests": len(work),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "repeats_s": [round(repeat_s, 4) for repeat_s in seconds],
        "seconds": round(median_s, 4),
        "output_tok_s": round(output / median_s, 2),
        "total_tok_s": round((output + prompt) / median_s, 2),
    }


def peak_rss_bytes() -> int:
    """The peak memory of this process."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _seconds(run: Run, work: Work) -> float:
    begin = time.perf_counter()
    outputs = run(work)
    seconds = time.perf_counter() - begin
    counts, expected = [len(ids) for ids in outputs], [count for _, count in work]
    if counts != expected:
        raise SystemExit(f"the engine generated {counts} tokens instead of {expected}: the measurement is invalid")
    return seconds


def _print(**record: Any) -> None:
    print(json.dumps(record), flush=True)
