"""What do parallel samples of one prompt cost, and a beam search?

samples  a prompt of 1,000 tokens with n=1 and n=8: how many tokens are computed until each sample has its first token,
         how long that takes, and the maximum number of K/V blocks in use. The prompt is computed and stored once, so
         eight samples should cost less than 1.3 times as much as one.
beams    a beam search of width 4 here and by `generate(num_beams=4)` of transformers, on the same weights in the same
         dtype: tokens per second of the returned text, and whether both return the same texts.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from statistics import median
from typing import Any

from harness.console import finish, progress, show
from harness.engines import vocabulary_of
from harness.options import add_model_options, integers, name_of, parser_for, settings_of, source_of
from penstock import EngineConfig, InferenceEngine, SamplingParams
from penstock.models.baseline import load_module

EPILOG = """examples:
  python benchmarks/parallel_sampling.py
  python benchmarks/parallel_sampling.py --shape qwen3-0.6b --repeats 1
"""
Texts = list[list[int]]


def prompts(count: int, length: int, vocab_size: int, seed: int) -> Texts:
    """Random token ids, no two alike."""
    rng = random.Random(seed)
    return [[rng.randrange(5, vocab_size) for _ in range(length)] for _ in range(count)]


def engine_for(source: str, settings: dict[str, Any], tokens: int) -> InferenceEngine:
    """An engine on token ids that prefills a prompt in one step and has room for everything."""
    room = {
        "max_sequence_length": None,
        "max_num_batched_tokens": 1024,
        "kv_cache_tokens": tokens,
        "batch_timeout_ms": 0,
    }
    quiet = {"skip_tokenizer_init": True, "log_level": "ERROR", "preallocate_kv_cache": True}
    return InferenceEngine(source, **{**room, **quiet, **settings})


def tokens_run(engine: InferenceEngine) -> float:
    """Tokens computed so far."""
    batch_tokens = engine.get_stats()["performance_metrics"].get("batch_tokens", {"mean": 0.0, "count": 0})
    return float(batch_tokens["mean"] * batch_tokens["count"])


async def sample(engine: InferenceEngine, prompt: list[int], n: int, new_tokens: int) -> dict[str, float]:
    """The measurements of one request with `n` samples."""
    params = SamplingParams(n=n, temperature=1.0, seed=1, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    before, begin = tokens_run(engine), time.perf_counter()
    first_token_s: dict[int, float] = {}
    blocks = 0
    async for delta in engine.generate(prompt, params):
        first_token_s.setdefault(delta.index, time.perf_counter() - begin)
        if len(first_token_s) == n:  # statistics take their time
            cache = engine.get_stats()["cache_info"]
            blocks = max(blocks, cache["num_blocks"] - cache["num_free_blocks"])
    num_computed = tokens_run(engine) - before
    prefilled = num_computed - n * (new_tokens - 1)
    return {"prefilled": prefilled, "first_tokens_s": max(first_token_s.values()), "blocks": blocks}


async def samples(source: str, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians of `sample` for one sample and for several, alternately."""
    counts = (1, args.n)
    results: dict[int, list[dict[str, float]]] = {n: [] for n in counts}
    inputs = prompts(len(counts) * (args.repeats + 1), args.prompt, vocabulary_of(source), seed=0)
    async with engine_for(source, settings, 4 * args.prompt) as engine:
        for number, prompt in enumerate(inputs):
            n = counts[number % len(counts)]
            figures = await sample(engine, prompt, n, args.new_tokens)
            if number >= len(counts):  # the first of each touches the memory and compiles
                results[n].append(figures)
    return {f"n={n}": {name: median(row[name] for row in rows) for name in rows[0]} for n, rows in results.items()}


async def search(source: str, settings: dict[str, Any], inputs: Texts, args: argparse.Namespace) -> tuple[Texts, float]:
    """The best text for each prompt, one after the other, and the seconds that took."""
    beams = {"use_beam_search": True, "best_of": args.width, "temperature": 0.0}
    params = SamplingParams(**beams, max_tokens=args.beam_tokens, ignore_eos=True, detokenize=False)
    async with engine_for(source, settings, 4096) as engine:
        await engine.generate(inputs[0], params)
        begin = time.perf_counter()
        outputs = [await engine.generate(prompt, params) for prompt in inputs[1:]]
        return [output.generated_ids for output in outputs], time.perf_counter() - begin


def search_by_transformers(
    source: str, config: EngineConfig, inputs: Texts, args: argparse.Namespace
) -> tuple[Texts, float]:
    """The same by `generate(num_beams=...)`."""
    import torch

    module = load_module(source, config)
    options = {"num_beams": args.width, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generate(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt], device=module.device)
        with torch.inference_mode():
            out = module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.beam_tokens, **options)
        text: list[int] = out[0, len(prompt) :].tolist()
        return text

    generate(inputs[0])
    begin = time.perf_counter()
    return [generate(prompt) for prompt in inputs[1:]], time.perf_counter() - begin


def beams(source: str, settings: dict[str, Any], length: int, args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of both for prompts of one length, alternately, and the fraction of equal texts."""
    inputs = prompts(args.searches + 1, length, vocabulary_of(source), seed=length)
    total, num_same = args.searches * args.beam_tokens, 0
    rates: dict[str, list[float]] = {"penstock": [], "transformers": []}
    for _ in range(args.repeats):
        ours, seconds = asyncio.run(search(source, settings, inputs, args))
        rates["penstock"].append(total / seconds)
        theirs, seconds = search_by_transformers(source, EngineConfig(**settings), inputs, args)
        rates["transformers"].append(total / seconds)
        num_same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    results = {name: median(values) for name, values in rates.items()}
    return {**results, "speedup": results["penstock"] / results["transformers"], "same_texts": num_same / args.searches}


def main() -> None:
    """Measure, and print the tables and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser)
    parser.add_argument("--n", type=int, default=8, help="samples beside one (default: 8)")
    parser.add_argument("--prompt", type=int, default=1000, help="prompt tokens of the samples (default: 1000)")
    parser.add_argument("--new-tokens", type=int, default=16, help="new tokens of each sample (default: 16)")
    parser.add_argument("--width", type=int, default=4, help="beams (default: 4)")
    parser.add_argument(
        "--searches", type=int, default=4, help="prompts to search for, one after the other (default: 4)"
    )
    parser.add_argument(
        "--beam-prompts", type=integers, default=[64, 512], help="prompt tokens of searches (default: 64,512)"
    )
    parser.add_argument("--beam-tokens", type=int, default=64, help="new tokens of a search (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions; medians are shown (default: 3)")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    source, settings = source_of(args), settings_of(args)
    searched: dict[str, dict[str, float]] = {}
    with progress(1 + len(args.beam_prompts)) as step:
        step("samples")
        sampled = asyncio.run(samples(source, settings, args))
        for length in args.beam_prompts:
            step(f"searches after {length} tokens")
            searched[str(length)] = beams(source, {"dtype": "float32", **settings}, length, args)
    single, several = sampled["n=1"], sampled[f"n={args.n}"]
    sampled["ratio"] = {name: several[name] / single[name] for name in single}
    title = f"{name_of(args)}, {args.prompt} prompt tokens"
    show(title, ("", *single), [[name, *figures.values()] for name, figures in sampled.items()])
    columns = ("prompt tokens", *next(iter(searched.values())))
    rows = [[length, *figures.values()] for length, figures in searched.items()]
    show(f"searches of width {args.width}, output tokens per second", columns, rows)
    finish({"model": name_of(args), "samples": sampled, "beams": searched})


if __name__ == "__main__":
    main()
