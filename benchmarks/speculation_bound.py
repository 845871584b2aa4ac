"""Is an engine with enable_speculative_decoding="auto", the default, ever slower than one without speculation?

The same requests run with "auto" and with False in alternating order, as pairs, on one engine per row of the table. The
outputs of a pair must be equal. What "auto" has to learn about a workload is part of its time: before the pairs, an
engine only runs without speculation.

  chat   short questions, sampled at temperature 0.7; by the chat template of the model, if it has one
  edit   a file of the standard library to write down again, greedy
  noise  random tokens as the prompt, sampled at temperature 2: nothing repeats

A ratio is tokens per second with "auto" over those without, the median over the pairs, and its error is the standard
error of that median. The exit status is 1 if a ratio is below 0.97 by more than its error.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice
from math import sqrt
from statistics import median
from typing import Any, Literal

from harness.console import Step, finish, progress, show
from harness.options import add_model_options, integers, name_of, parser_for, settings_of, source_of
from harness.texts import files
from penstock import EngineConfig, InferenceEngine, SamplingParams

EPILOG = """examples:
  python benchmarks/speculation_bound.py
  python benchmarks/speculation_bound.py --model FOLDER --workloads chat,edit --streams 1 --pairs 20
"""
BOUND = 0.97
WORKLOADS = ("chat", "edit", "noise")
PROMPT_TOKENS = 192
QUESTIONS = (
    "What is a hash table, and when is it slow?",
    "Write a short poem about the sea.",
    "Explain to a child why the sky is blue.",
    "Give me five names for a bakery, with a reason for each.",
    "How do I make a cup of tea?",
    "Write a Python function that reverses a list, and explain it.",
    "What happened in Europe in 1848?",
    "Which exercises help against back pain?",
)
Request = tuple[list[int], SamplingParams]


@dataclass(frozen=True)
class Ratios:
    """The ratios of adjacent measurements: tokens per second with "auto" over those without speculation."""

    ratios: Sequence[float]

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.ratios)

    @property
    def error(self) -> float:
        """The standard error of the median, from the median absolute deviation, as if the ratios were normal."""
        deviation = median(abs(ratio - self.median) for ratio in self.ratios)
        return 1.2533 * 1.4826 * deviation / sqrt(len(self.ratios))

    @property
    def holds(self) -> bool:
        """Whether the bound may be kept."""
        return self.median + self.error >= BOUND


def tokens_of_chat(tokenizer: Any, question: str) -> list[int]:
    """A question in the form that the model was trained for."""
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(f"# {question}\n"))
    messages = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def tokens_of_edit(tokenizer: Any, text: str) -> list[int]:
    """A text, and the request to write it once more."""
    cut = tokenizer.decode(tokenizer.encode(text)[:PROMPT_TOKENS], skip_special_tokens=True)
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(f"{cut}\n\n\n# The same again:\n{cut[:120]}"))
    return tokens_of_chat(tokenizer, f"Repeat this code and add a comment to each function:\n\n{cut}")


def prompts(workload: str, tokenizer: Any, number: int) -> list[int]:
    """The prompt with this number; the same on every run."""
    if workload == "chat":
        return tokens_of_chat(tokenizer, QUESTIONS[number % len(QUESTIONS)])
    if workload == "edit":
        texts = files()
        return tokens_of_edit(tokenizer, texts[number % len(texts)])
    return random.Random(number).choices(range(10, len(tokenizer) - 10), k=PROMPT_TOKENS)


def requests(workload: str, tokenizer: Any, streams: int, pairs: int, new_tokens: int) -> list[list[Request]]:
    """For each pair, a request per stream."""
    temperature = {"chat": 0.7, "edit": 0.0, "noise": 2.0}[workload]

    def request(number: int) -> Request:
        params = SamplingParams(
            temperature=temperature, max_tokens=new_tokens, seed=number, ignore_eos=True, detokenize=False
        )
        return prompts(workload, tokenizer, number), params

    numbers = count()
    return [[request(number) for number in islice(numbers, streams)] for _ in range(pairs)]


async def run(
    engine: InferenceEngine, batch: Sequence[Request], speculates: bool | Literal["auto"]
) -> tuple[float, list[list[int]]]:
    """Seconds, and the generated tokens."""
    engine.config.enable_speculative_decoding = speculates
    begin = time.perf_counter()
    outputs = await asyncio.gather(*(engine.generate(prompt, params) for prompt, params in batch))
    return time.perf_counter() - begin, [output.generated_ids for output in outputs]


async def pair(engine: InferenceEngine, batch: Sequence[Request], auto_first: bool) -> float:
    """The ratio of one pair. Raises `SystemExit` if the outputs differ."""
    order: tuple[bool | Literal["auto"], ...] = ("auto", False) if auto_first else (False, "auto")
    results = {speculates: await run(engine, batch, speculates) for speculates in order}
    if results[False][1] != results["auto"][1]:
        raise SystemExit("speculation changed the output")
    return results[False][0] / results["auto"][0]


async def measure(args: argparse.Namespace, step: Step) -> dict[str, Ratios]:
    """The ratios by workload and streams."""
    from transformers import AutoTokenizer

    source, tokenizer = source_of(args), AutoTokenizer.from_pretrained(source_of(args))
    results: dict[str, Ratios] = {}
    for workload in args.workloads:
        for streams in args.streams:
            batches = requests(workload, tokenizer, streams, args.pairs, args.new_tokens)
            room = {"kv_cache_tokens": 1024 * streams, "max_batch_size": streams, "enable_kv_cache": False}
            config = EngineConfig(**{**room, "log_level": "ERROR", **settings_of(args)})
            async with InferenceEngine(source, config=config) as engine:
                await run(engine, batches[0], False)
                ratios = []
                for number, batch in enumerate(batches):
                    step(f"{workload}, {streams} streams, pair {number + 1}")
                    ratios.append(await pair(engine, batch, auto_first=number % 2 == 1))
            results[f"{workload}, {streams}"] = Ratios(ratios)
    return results


def names(text: str) -> list[str]:
    """For argparse."""
    chosen = text.split(",")
    if unknown := set(chosen) - set(WORKLOADS):
        raise argparse.ArgumentTypeError(f"unknown workload {', '.join(unknown)}: choose from {', '.join(WORKLOADS)}")
    return chosen


def summary(results: dict[str, Ratios]) -> dict[str, dict[str, Any]]:
    """For the JSON document."""
    return {
        name: {
            "ratio": round(row.median, 3),
            "error": round(row.error, 3),
            "holds": row.holds,
            "ratios": [round(ratio, 3) for ratio in row.ratios],
        }
        for name, row in results.items()
    }


def main() -> None:
    """Measure, and print the table and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser)
    parser.add_argument("--workloads", type=names, default=list(WORKLOADS), metavar="W,W", help="default: all")
    parser.add_argument("--streams", type=integers, default=[1, 8, 32], metavar="N,N", help="default: 1,8,32")
    parser.add_argument("--pairs", type=int, default=12, metavar="N", help="pairs per row (default: 12)")
    parser.add_argument("--new-tokens", type=int, default=96, metavar="N", help="of a request (default: 96)")
    args = parser.parse_args()
    with progress(len(args.workloads) * len(args.streams) * args.pairs) as step:
        results = asyncio.run(measure(args, step))
    rows = [[name, row.median, row.error, "yes" if row.holds else "no"] for name, row in results.items()]
    show(f"{name_of(args)}, medians of {args.pairs} pairs", ("workload, streams", "ratio", "error", "holds"), rows)
    load = round(os.getloadavg()[0], 2)
    finish({"model": name_of(args), "pairs": args.pairs, "load_average": load, "rows": summary(results)})
    sys.exit(0 if all(row.holds for row in results.values()) else 1)


if __name__ == "__main__":
    main()
