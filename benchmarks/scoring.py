"""What does it cost to score a response whose prompt is cached?

score     `engine.score` of a response after a prompt of 2,000 tokens that the cache holds, alone in the engine
prefill   as many tokens as the end of a prompt, after the same cached prompt: `generate` until the first token

A score should cost at most 1.3 times the prefill, which computes one row of logits where a score needs one for each
token. `head` is what that alone makes of the ratio, by operations and without attention. Seconds are those of the
process's CPU time, which other programs disturb less than the clock; with several threads they count each of them.
Each measurement has a response of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

from harness.console import Step, finish, progress, show
from harness.engines import vocabulary_of
from harness.footprint import footprint
from harness.options import add_model_options, integers, name_of, parser_for, settings_of, source_of
from penstock import InferenceEngine, SamplingParams

EPILOG = """examples:
  python benchmarks/scoring.py
  python benchmarks/scoring.py --shape qwen3-0.6b --prompt 2000 --responses 32,128 --repeats 3
"""
ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
Texts = list[list[int]]


def texts(count: int, length: int, vocab_size: int, seed: int) -> Texts:
    """Random token ids, no two alike."""
    rng = random.Random(seed)
    return [[rng.randrange(5, vocab_size) for _ in range(length)] for _ in range(count)]


async def measure(engine: InferenceEngine, prompt: list[int], responses: Texts) -> dict[str, float]:
    """Medians of seconds, over the responses: each way takes its turn, the first of each is not counted."""
    seconds: dict[str, list[float]] = {"score": [], "prefill": []}
    await engine.generate(prompt, ONE_TOKEN)
    for number, response in enumerate(responses):
        way = list(seconds)[number % len(seconds)]
        begin = time.process_time()
        if way == "prefill":
            await engine.generate(prompt + response, ONE_TOKEN)
        else:
            await engine.score(prompt, response)
        seconds[way].append(time.process_time() - begin)
    return {way: median(values[1:]) for way, values in seconds.items()}


def least_ratio(source: str, length: int) -> float | None:
    """Operations of layers and of a head for each token, over those with a head for one; None if they are unknown."""
    sizes = footprint(Path(source)) if Path(source).is_dir() else None
    return None if sizes is None else length * (sizes.layers + sizes.head) / (length * sizes.layers + sizes.head)


async def score(source: str, settings: dict[str, Any], args: argparse.Namespace, step: Step) -> dict[int, Any]:
    """The measurements for every length of a response."""
    room = {"max_sequence_length": None, "max_num_batched_tokens": 1024, "batch_timeout_ms": 0}
    room["kv_cache_tokens"] = 4 * (args.prompt + max(args.responses))
    quiet = {"skip_tokenizer_init": True, "log_level": "ERROR", "preallocate_kv_cache": True}
    vocab_size, figures = vocabulary_of(source), {}
    async with InferenceEngine(source, **{**room, **quiet, **settings}) as engine:
        (prompt,) = texts(1, args.prompt, vocab_size, seed=0)
        for length in args.responses:
            step(f"responses of {length} tokens")
            responses = texts(2 * (args.repeats + 1), length, vocab_size, seed=length)
            seconds = await measure(engine, prompt, responses)
            ratios = {"ratio": seconds["score"] / seconds["prefill"], "head": least_ratio(source, length)}
            figures[length] = {**seconds, **ratios}
    return figures


def main() -> None:
    """Measure, and print the table and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser)
    parser.add_argument("--prompt", type=int, default=1900, help="tokens of the cached prompt (default: 1900)")
    parser.add_argument("--responses", type=integers, default=[32, 128, 512], help="tokens (default: 32,128,512)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions; medians are shown (default: 5)")
    args = parser.parse_args()
    source, settings = source_of(args), settings_of(args)
    with progress(len(args.responses)) as step:
        figures = asyncio.run(score(source, settings, args, step))
    columns = ("response tokens", *next(iter(figures.values())))
    rows = [[length, *row.values()] for length, row in figures.items()]
    show(f"{name_of(args)}, {args.prompt} cached prompt tokens, seconds", columns, rows)
    finish({"model": name_of(args), "prompt": args.prompt, "responses": figures})


if __name__ == "__main__":
    main()
