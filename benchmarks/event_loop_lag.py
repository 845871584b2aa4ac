"""How long does the engine keep the program's own event loop from running?

A heartbeat coroutine wakes every 5 ms in the loop that uses the engine; its lag is how late it wakes. Four phases:
prefills of 4,000 tokens, 64 concurrent streams, tokenizing a 1 MB prompt (which is then refused as too large), and
the start of another engine, with the demo model and a tokenizer of 100,000 words that was created before. The model is
a small random Llama, so that most of the time is spent outside the model. The last line of the output is JSON: p50, p99
and max lag in milliseconds by phase, and the same for an idle loop as a baseline.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import time
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any

from penstock import InferenceEngine, SamplingParams
from penstock.demo import MODEL_DIR
from penstock.errors import RequestTooLarge

PERIOD_S = 0.005
PREFILL_TOKENS = 4000
NUM_PREFILLS = 4
NUM_STREAMS = 64
NUM_TOKENS = 120
MEGABYTE = 1 << 20

Phase = Callable[[InferenceEngine], Awaitable[None]]


async def heartbeat(lags_s: list[float]) -> None:
    """Record how late every beat is."""
    while True:
        due_s = time.perf_counter() + PERIOD_S
        await asyncio.sleep(PERIOD_S)
        lags_s.append(time.perf_counter() - due_s)


async def idle(engine: InferenceEngine) -> None:
    """The baseline: nothing runs."""
    await asyncio.sleep(0.5)


async def prefill(engine: InferenceEngine) -> None:
    """A few long prompts, one after the other, that share no prefix."""
    for offset in range(NUM_PREFILLS):
        await engine.generate([offset + i % 200 for i in range(PREFILL_TOKENS)], SamplingParams(max_tokens=1))


async def stream(engine: InferenceEngine) -> None:
    """Many readers, each taking every delta."""
    await asyncio.gather(*(read(engine, i) for i in range(NUM_STREAMS)))


async def read(engine: InferenceEngine, number: int) -> None:
    """Take one request's deltas."""
    async for _ in engine.generate([1 + number] * 8, SamplingParams(max_tokens=NUM_TOKENS)):
        pass


async def tokenize(engine: InferenceEngine) -> None:
    """A megabyte of text."""
    try:
        await engine.generate("The keeper closes the gate slowly, turn by turn. " * (MEGABYTE // 49))
    except RequestTooLarge:
        return
    raise AssertionError("a megabyte cannot fit")


async def start(engine: InferenceEngine) -> None:
    """Start another engine: its model is read, tried and packed, its tokenizer copied."""
    STARTED.append(InferenceEngine(MODEL_DIR, large_tokenizer(), kv_cache_tokens=1024))
    await asyncio.to_thread(STARTED[-1].start)


STARTED: list[InferenceEngine] = []  # so that their destruction is not measured
PHASES: dict[str, Phase] = {"idle": idle, "prefill": prefill, "stream": stream, "tokenize": tokenize, "start": start}


async def lag_ms(engine: InferenceEngine, phase: Phase) -> dict[str, float]:
    """Percentiles of the heartbeat's lag while a phase runs, in milliseconds."""
    lags_s: list[float] = []
    heartbeat_task = asyncio.create_task(heartbeat(lags_s))
    await asyncio.sleep(2 * PERIOD_S)
    lags_s.clear()
    await phase(engine)
    await asyncio.sleep(2 * PERIOD_S)  # a delay at the very end counts too
    heartbeat_task.cancel()
    ordered = sorted(1000 * lag for lag in lags_s)
    percentiles = {f"p{q}": ordered[min(len(ordered) - 1, q * len(ordered) // 100)] for q in (50, 99)}
    return {"beats": len(ordered), **percentiles, "max": ordered[-1]}


async def measure(engine: InferenceEngine) -> dict[str, dict[str, float]]:
    """Every phase once, after an unmeasured warm-up."""
    async with engine:
        await engine.generate("Warm up.", SamplingParams(max_tokens=4))
        await start(engine)
        gc.collect()
        gc.freeze()  # garbage collection of imported modules is not the engine's work
        return {name: await lag_ms(engine, phase) for name, phase in PHASES.items()}


@cache
def large_tokenizer() -> Any:
    """100,000 words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"word{number}": number for number in range(100_000)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(words, [])))


def small_model() -> tuple[Any, Any]:
    """A random Llama with room for 8,192 tokens, and a byte-level tokenizer for it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=len(alphabet), max_position_embeddings=8192, **sizes)
    return AutoModelForCausalLM.from_config(config).eval(), PreTrainedTokenizerFast(tokenizer_object=backend)


def make_engine() -> InferenceEngine:
    """An engine with as many rows as there are streams."""
    return InferenceEngine(*small_model(), max_sequence_length=8192, max_batch_size=NUM_STREAMS, verify_model=False)


def main() -> None:
    """Measure, and print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    result = asyncio.run(measure(make_engine()))
    for name, lag in result.items():
        print(f"{name:10}" + "".join(f"{key:>8} {value:8.2f}" for key, value in lag.items()))
    print(json.dumps({name: {key: round(value, 3) for key, value in lag.items()} for name, lag in result.items()}))


if __name__ == "__main__":
    main()
