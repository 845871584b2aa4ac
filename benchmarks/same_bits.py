"""Does a request get the same tokens and log probabilities, bit for bit, alone and in every way an engine may run it?

Twenty requests over ragged prompts, greedy and sampled, with log probabilities, run one at a time in a deterministic
engine. Then they run together: in chunks of several sizes, on two threads, over cached prefixes, in a cache that is too
small for them, and with drafts. For each way the table has the number of requests of which a token or any bit differs
from the request that ran alone: 0 in every row, or there is a defect. Random weights may hide one that a trained model
shows.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import penstock
from harness.console import finish, progress, show
from harness.options import add_model_options, name_of, parser_for, settings_of, source_of
from penstock import EngineConfig, InferenceEngine, SamplingParams
from penstock.cli.session import quiet_libraries

EPILOG = """examples:
  python benchmarks/same_bits.py
  python benchmarks/same_bits.py --model FOLDER --dtype bfloat16 --quantization int8
  python benchmarks/same_bits.py --model FOLDER --dtype float32
  python benchmarks/same_bits.py --set kv_cache_dtype=int8
"""
TEXT = Path(penstock.__file__).parent / "models" / "calibration.txt"
CHARACTERS = (9, 20, 31, 55, 64, 90, 110, 130, 170, 230, 300, 420, 500, 620, 700, 800)
BASE = {"deterministic": True, "num_threads": 1, "enable_kv_cache": False, "enable_speculative_decoding": False}
CACHED = {"enable_kv_cache": True}
WAYS: dict[str, dict[str, Any]] = {
    "together": {},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "chunks of 33": {"max_num_batched_tokens": 33},
    "chunks of 200": {"max_num_batched_tokens": 200},
    "2 threads": {"num_threads": 2},
    "after cached prefixes": CACHED,
    "after cached prefixes, blocks of 64": CACHED | {"block_size": 64},
    "preempted": {"kv_cache_tokens": 768},
    "preempted, read back": CACHED | {"kv_cache_tokens": 768, "swap_space": 1.0},
    "n-gram drafts": {"enable_speculative_decoding": True},
}
Outcome = tuple[tuple[int, ...], str]


def requests(num_new: int) -> list[tuple[str, SamplingParams]]:
    """Prompts of many lengths, the last four with a common prefix; two in three are greedy."""
    text, rng = TEXT.read_text(), random.Random(3)
    places = [rng.randrange(len(text) // 2) for _ in CHARACTERS]
    prompts = [text[place : place + size] for place, size in zip(places, CHARACTERS, strict=True)]
    prompts += [text[:300] + prompt for prompt in prompts[:8:2]]
    sampled: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9}
    return [
        (prompt, SamplingParams(max_tokens=num_new, logprobs=3, ignore_eos=True, **extra))
        for i, prompt in enumerate(prompts)
        for extra in [sampled | {"seed": i} if i % 3 == 1 else {"temperature": 0.0}]
    ]


def outcome(output: Any) -> Outcome:
    """Tokens, and all log probabilities as text, which shows every bit."""
    completion = output.outputs[0]
    return tuple(completion.token_ids), repr(completion.logprobs)


async def generate(
    source: str, settings: dict[str, Any], asked: Sequence[tuple[str, SamplingParams]], *, together: bool
) -> tuple[list[Outcome], int]:
    """The outcomes of the requests in an engine of these settings, and how often one was preempted."""
    async with InferenceEngine(source, config=EngineConfig(**settings)) as engine:
        if settings["enable_kv_cache"]:
            for prompt, _ in asked:
                await engine.generate({"prompt": prompt[: len(prompt) * 2 // 3]}, SamplingParams(max_tokens=1))
        if together:
            handles = [engine.generate({"prompt": prompt}, params) for prompt, params in asked]
            outcomes = [outcome(output) for output in await asyncio.gather(*handles)]
        else:
            outcomes = [outcome(await engine.generate({"prompt": prompt}, params)) for prompt, params in asked]
        return outcomes, engine.get_stats()["queue"]["num_preemptions"]


async def compare(source: str, settings: dict[str, Any], num_new: int) -> dict[str, dict[str, int]]:
    """Per way, the requests of which tokens or bits differ from those alone."""
    asked = requests(num_new)
    results = {}
    with progress(len(WAYS) + 1) as step:
        step("alone")
        wanted, _ = await generate(source, {**BASE, **settings}, asked, together=False)
        for way, changes in WAYS.items():
            step(way)
            found, preemptions = await generate(source, {**BASE, **changes, **settings}, asked, together=True)
            pairs = list(zip(found, wanted, strict=True))
            tokens, bits = sum(a[0] != b[0] for a, b in pairs), sum(a != b for a, b in pairs)
            results[way] = {"tokens_differ": tokens, "bits_differ": bits, "preemptions": preemptions}
    return results


def main() -> None:
    """Compare, and print the table and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser)
    parser.add_argument("--tokens", type=int, metavar="N", default=24, help="new ones of each request (default: 24)")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Compare what was asked for."""
    quiet_libraries()
    settings = settings_of(args)
    results = asyncio.run(compare(source_of(args), settings, args.tokens))
    columns = ("", "tokens differ", "bits differ", "preemptions")
    show(f"{name_of(args)}, of 20 requests", columns, [[way, *row.values()] for way, row in results.items()])
    finish({"model": name_of(args), "settings": settings, "tokens": args.tokens, **results})


if __name__ == "__main__":
    main()
