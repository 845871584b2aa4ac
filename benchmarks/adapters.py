"""What do adapters cost: requests of several LoRA adapters in one batch, compared with as many requests of the base?

A live module of random weights is borrowed, and adapters of peft for all its linear layers are loaded. Reported are the
tokens per second of one request per adapter, all in the same steps, and of as many requests without an adapter. Then an
adapter is replaced while another streams: the seconds until the caller may go on, the processor time of reading and
packing it, the seconds until the model has it, which wait for the end of the running step, and for how long that holds
the model up; and the longest gap between two tokens of the stream while an adapter is replaced, and at other times.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from harness.console import finish, note, show
from harness.options import parser_for
from penstock import InferenceEngine, SamplingParams
from penstock.config import EngineConfig
from penstock.kernels.low_rank import PackedAdapter
from penstock.models.adapters.packed import PackedAdapters
from penstock.models.baseline import SHAPES, random_module

EPILOG = """examples:
  python benchmarks/adapters.py
  python benchmarks/adapters.py --shape llama-160m --adapters 8 --rank 16 --mode shared
"""
MODES = ("packed", "shared")
PROMPT_TOKENS = 64
TOKENS_BETWEEN = 8  # of the stream, from one replacement to the next


def adapted(module: Any, rank: int) -> Any:
    """A copy of the module with one adapter of random matrices."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(module), LoraConfig(r=rank, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


async def rate(engine: InferenceEngine, names: Sequence[str], num_tokens: int) -> float:
    """Tokens per second of one request for each name, after their prompts."""
    prompts = [[(7 * i + 13 * j) % 1000 + 2 for j in range(PROMPT_TOKENS)] for i in range(len(names))]
    firsts: list[float] = []

    async def one(prompt: list[int], name: str) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        handle = engine.generate(prompt, params, adapter=name)
        await anext(aiter(handle))
        firsts.append(time.perf_counter())
        await handle

    await asyncio.gather(*(one(prompt, name) for prompt, name in zip(prompts, names, strict=True)))
    return len(names) * (num_tokens - 1) / (time.perf_counter() - max(firsts))


@contextmanager
def timed(owner: type, name: str, clock: Callable[[], float]) -> Iterator[list[tuple[float, float]]]:
    """The times by a clock at which calls of a method begin and end from here on."""
    method, calls = getattr(owner, name), list[tuple[float, float]]()

    def call(*arguments: Any) -> Any:
        begin = clock()
        result = method(*arguments)
        calls.append((begin, clock()))
        return result

    with patch.object(owner, name, call):
        yield calls


def median_of(spans: Sequence[tuple[float, float]]) -> float:
    """The median length."""
    return statistics.median(end - begin for begin, end in spans)


async def replacing(engine: InferenceEngine, model: Any, names: Sequence[str], repeats: int) -> dict[str, float]:
    """Seconds: medians of replacing an adapter while another streams, and the stream's longest gaps, then and else."""
    with (
        timed(PackedAdapters, "read", time.thread_time) as reads,
        timed(PackedAdapter, "put", time.perf_counter) as writes,
    ):
        arrivals, changes = await streamed(engine, model, names, repeats)
    applied = [(begin, end) for (begin, _), (_, end) in zip(changes, writes, strict=True)]
    gaps: dict[bool, list[float]] = {True: [0.0], False: [0.0]}
    for first, last in itertools.pairwise(arrivals):
        gaps[any(begin < last and end > first for begin, end in applied)].append(last - first)
    times = {"replace_s": changes, "cpu_s": reads, "applied_s": applied, "held_s": writes}
    medians = {key: median_of(spans) for key, spans in times.items()}
    return {**medians, "gap_s": max(gaps[True]), "other_gap_s": max(gaps[False])}


async def streamed(
    engine: InferenceEngine, model: Any, names: Sequence[str], repeats: int
) -> tuple[list[float], list[tuple[float, float]]]:
    """The times of a stream's tokens, and from when to when an adapter was replaced meanwhile."""
    params = SamplingParams(temperature=0.0, max_tokens=1500, ignore_eos=True)
    handle = engine.generate([5] * PROMPT_TOKENS, params, adapter=names[0])
    arrivals: list[float] = []
    changes: list[tuple[float, float]] = []
    tasks: list[asyncio.Task[None]] = []

    async def replace() -> None:
        begin = time.perf_counter()
        await engine.load_adapter(names[1], model)
        changes.append((begin, time.perf_counter()))

    async for _ in handle:
        arrivals.append(time.perf_counter())
        if len(changes) == repeats:
            break
        if len(arrivals) % TOKENS_BETWEEN == 0 and len(tasks) == len(changes):
            tasks.append(asyncio.create_task(replace()))
    await asyncio.gather(*tasks)
    handle.cancel()
    await engine.generate([5], SamplingParams(max_tokens=1))  # comes after the last change
    return arrivals, changes


async def measure(module: Any, model: Any, mode: Any, args: argparse.Namespace) -> dict[str, float]:
    """The figures of one mode."""
    engine = InferenceEngine(module, skip_tokenizer_init=True, verify_model=False, weight_mode=mode)
    names = [f"adapter-{i}" for i in range(args.adapters)]
    base = [""] * args.adapters
    async with engine:
        await rate(engine, base, args.tokens)  # the first steps allocate
        for name in names:
            await engine.load_adapter(name, model)
        best = {"base": 0.0, "adapters": 0.0}
        for _ in range(args.repeats):  # in turns, so that a disturbance of the machine meets both
            best["base"] = max(best["base"], await rate(engine, base, args.tokens))
            best["adapters"] = max(best["adapters"], await rate(engine, names, args.tokens))
        times = await replacing(engine, model, names, 4 * args.repeats)
    return {**best, "share": best["adapters"] / best["base"], **times}


def main() -> None:
    """Measure, and print the table and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen3-0.6b", help="sizes (default: qwen3-0.6b)")
    parser.add_argument("--dtype", metavar="T", default="bfloat16", help="of the module (default: bfloat16)")
    parser.add_argument("--adapters", type=int, default=8, help="in one batch (default: 8)")
    parser.add_argument("--rank", type=int, default=16, help="of each adapter (default: 16)")
    parser.add_argument("--tokens", type=int, default=32, help="of each request (default: 32)")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement, the best counts (default: 3)")
    parser.add_argument("--mode", choices=MODES, action="append", help="of the weights, repeatable (default: all)")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    module = random_module(args.shape, EngineConfig(dtype=args.dtype))
    model = adapted(module, args.rank)
    results: dict[str, dict[str, float]] = {}
    for mode in args.mode or MODES:
        note(mode)
        results[mode] = asyncio.run(measure(module, model, mode, args))
    keys = ("base", "adapters", "share", "replace_s", "cpu_s", "applied_s", "held_s", "gap_s", "other_gap_s")
    times = ("replace s", "CPU s", "applied s", "held s", "gap s", "other gap s")
    columns = ("weights", "base tok/s", "adapters tok/s", "of the base", *times)
    rows = [[mode, *(result.get(key) for key in keys)] for mode, result in results.items()]
    show(f"{args.shape}, {args.adapters} adapters of rank {args.rank}", columns, rows)
    finish({"shape": args.shape, "adapters": args.adapters, "rank": args.rank, "results": results})


if __name__ == "__main__":
    main()
