"""What does structured output cost while the model decodes?

Every row of a batch follows a JSON schema of its own, over a vocabulary of the model's full width; beside it the same
batch runs without constraints, alternately on one engine, so that both see the same machine. Reported are tokens per
second of both and the median ratio of adjacent runs, the 99th percentile of a step of both, and the time of compiling
the schemas. Only decoding counts, from the first token of every row on.

The tokenizer is made up: as many tokens as the model has logits, of random words, numbers and punctuation. Its masks
cost about what those of a trained vocabulary cost.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from harness.console import finish, progress, show
from harness.engines import vocabulary_of
from harness.options import add_model_options, name_of, parser_for, settings_of, source_of
from harness.stats import percentile
from penstock import InferenceEngine, SamplingParams, StructuredOutputs

EPILOG = """examples:
  python benchmarks/structured_output.py
  python benchmarks/structured_output.py --shape qwen3-0.6b --rows 32 --rounds 5
"""


@dataclass(slots=True)
class Runs:
    """Tokens per second of every run, and the seconds of every step."""

    rates: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


def made_up_tokenizer(size: int) -> Any:
    """A byte-level tokenizer of `size` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    vocabulary = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    marks = ['"', '":', '",', '{"', '"}', "],", "},", ":", ": ", "Ġ{", "Ċ", "ĊĠĠ", "ĊĠĠĠĠ"]
    while len(vocabulary) < size - 1:
        kind = rng.random()
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))
        if kind < 0.03:
            word = "".join(rng.choices(string.digits, k=rng.randint(2, 3)))
        elif kind < 0.08:
            word = rng.choice(marks) + word * (rng.random() < 0.7)
        elif kind < 0.55:
            word = "Ġ" + word
        vocabulary.setdefault(word, len(vocabulary))
    vocabulary["<|end|>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def schema(number: int) -> dict[str, Any]:
    """An endless list of records, of other fields in each row."""
    names = (f"name_{number}", "city", "note")
    fields: dict[str, Any] = {name: {"type": "string", "maxLength": 24} for name in names}
    fields |= {f"count_{number}": {"type": "integer"}, "kind": {"enum": ["red", "green", f"blue {number}"]}}
    record = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return {"type": "array", "items": record, "minItems": 10_000}


async def run(
    engine: InferenceEngine, prompts: Sequence[list[int]], params: Sequence[SamplingParams], runs: Runs
) -> None:
    """Decode all prompts together."""
    arrivals: list[list[tuple[float, int]]] = [[] for _ in prompts]

    async def stream(number: int) -> None:
        async for delta in engine.generate(prompts[number], params[number]):
            arrivals[number].append((time.perf_counter(), len(delta.token_ids)))

    await asyncio.gather(*map(stream, range(len(prompts))))
    begin = max(times[0][0] for times in arrivals)
    end = min(times[-1][0] for times in arrivals)
    tokens = sum(count for times in arrivals for at, count in times if begin < at <= end)
    runs.rates.append(tokens / (end - begin))
    steps = [at for at, _ in arrivals[0] if begin <= at <= end]
    runs.steps += [later - earlier for earlier, later in pairwise(steps)]


async def compare(source: str, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Both kinds of run alternately, after one of each that does not count."""
    size = vocabulary_of(source)
    rng = random.Random(1)
    prompts = [[rng.randrange(300, size - 1) for _ in range(args.prompt)] for _ in range(args.rows)]
    common = {"temperature": args.temperature, "seed": 0, "max_tokens": args.new_tokens, "ignore_eos": True}
    plain = [SamplingParams(**common) for _ in prompts]
    held = [StructuredOutputs(json=schema(number)) for number in range(args.rows)]
    constrained = [SamplingParams(**common, structured_outputs=outputs) for outputs in held]
    results = {"plain": Runs(), "constrained": Runs()}
    room = {"max_batch_size": args.rows, "kv_cache_tokens": 2 * args.rows * (args.prompt + args.new_tokens)}
    quiet = {"log_level": "ERROR", "preallocate_kv_cache": True, "enable_speculative_decoding": args.speculate}
    async with InferenceEngine(source, made_up_tokenizer(size), **{**room, **quiet, **settings}) as engine:
        with progress(2 * (args.rounds + 1)) as step:
            for number in range(args.rounds + 1):
                order = ("plain", "constrained") if number % 2 else ("constrained", "plain")
                for kind in order:
                    step(f"{kind}, round {number}")
                    runs = results[kind] if number else Runs()
                    await run(engine, prompts, plain if kind == "plain" else constrained, runs)
    return summary(results)


def summary(results: dict[str, Runs]) -> dict[str, Any]:
    """Medians and percentiles of both, and what the second adds."""
    plain, constrained = results["plain"], results["constrained"]
    ratios = [ours / theirs for ours, theirs in zip(constrained.rates, plain.rates, strict=True)]
    figures = {
        kind: {
            "tok_s": round(median(runs.rates), 1),
            "step_p50_ms": round(1e3 * median(runs.steps), 2),
            "step_p99_ms": round(1e3 * percentile(runs.steps, 99), 2),
        }
        for kind, runs in results.items()
    }
    added = {f"{name}_added_ms": round(figures["constrained"][key] - figures["plain"][key], 2)
             for name, key in (("p50", "step_p50_ms"), ("p99", "step_p99_ms"))}  # fmt: skip
    return {**figures, **added, "ratio": round(median(ratios), 4), "ratios": [round(ratio, 4) for ratio in ratios]}


def main() -> None:
    """Measure, and print the table and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser, default_shape="qwen3-0.6b")
    parser.add_argument("--rows", type=int, default=32, help="requests at once (default: 32)")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens of each (default: 32)")
    parser.add_argument("--new-tokens", type=int, default=128, help="new tokens of each (default: 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="temperature of the samples (default: 0, greedy)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each kind (default: 5)")
    parser.add_argument("--speculate", action="store_true", help="with speculation, which forced tokens use")
    args = parser.parse_args()
    result = asyncio.run(compare(source_of(args), settings_of(args), args))
    rows = [[kind, *result[kind].values()] for kind in ("plain", "constrained")]
    show(f"{name_of(args)}, {args.rows} rows", ("", "tokens/s", "step p50 ms", "step p99 ms"), rows)
    finish({"model": name_of(args), "rows": args.rows, "temperature": args.temperature, **result})


if __name__ == "__main__":
    main()
