"""Engines that load and serve in a process that loads and trains models of its own meanwhile.

PENSTOCK_SOAK_ROUNDS sets the number of rounds: a few by default, 100 for a soak.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from penstock import InferenceEngine, SamplingParams
from penstock.demo import MODEL_DIR
from tests.tiny_models import build

ROUNDS = int(os.environ.get("PENSTOCK_SOAK_ROUNDS", "3"))
PROMPTS = ("def main(", "class Gate:\n    ", "import ", "for i in range(")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PERIOD_S = 0.005
LATE_MS = 50.0
ATTEMPTS = 10


async def texts(dtype: str) -> list[list[int]]:
    """The tokens of a new engine of the demo model, for all prompts at once."""
    async with InferenceEngine(dtype=dtype, kv_cache_tokens=1024, num_threads=1) as engine:
        outputs = await asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in PROMPTS))
        return [output.generated_ids for output in outputs]


def train(steps: int = 3) -> list[float]:
    """Losses of a small model of the program's own; always the same ones."""
    ids = torch.arange(24)[None] * 5 % 160
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def program(folder: Path, over: threading.Event, problems: list[str]) -> None:
    """Loads models in several dtypes and trains one, again and again, until the engines are done."""
    expected = train()
    while not over.is_set():
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            if {parameter.dtype for parameter in model.parameters()} != {dtype}:
                problems.append(f"a model of the program's own was not {dtype}")
        if torch.zeros(1).dtype != torch.float32:
            problems.append("the program's default dtype changed")
        losses = train()
        if losses != expected:
            problems.append(f"training gave {losses} instead of {expected}")


@contextmanager
def busy_program(folder: Path) -> Iterator[list[str]]:
    """The program's other thread; what it met is in the list afterwards."""
    over, problems = threading.Event(), list[str]()

    def run() -> None:
        try:
            program(folder, over, problems)
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield problems
    finally:
        over.set()
        thread.join()


@pytest.mark.timeout(60 + 30 * ROUNDS)
async def test_engines_of_two_dtypes_load_and_serve_beside_a_program_that_loads_and_trains(tmp_path: Path) -> None:
    """The second load crashed the process, or left it unable to load anything."""
    build("llama").save_pretrained(tmp_path)
    expected = {dtype: await texts(dtype) for dtype in ("float32", "bfloat16")}
    with busy_program(tmp_path) as problems:
        for _ in range(ROUNDS):
            results = await asyncio.gather(*(texts(dtype) for dtype in expected))
            assert dict(zip(expected, results, strict=True)) == expected
    assert problems == []
    assert await texts("float32") == expected["float32"]
    assert next(AutoModelForCausalLM.from_pretrained(tmp_path).parameters()).device.type == "cpu"


@cache
def large_tokenizer() -> PreTrainedTokenizerFast:
    """100,000 words."""
    words = {f"word{number}": number for number in range(100_000)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(words, [])))


async def start_engine(started: list[InferenceEngine]) -> None:
    """Load the demo model, and copy a tokenizer of a usual size for the engine's threads."""
    started.append(InferenceEngine(MODEL_DIR, large_tokenizer(), kv_cache_tokens=1024, num_threads=1))
    await asyncio.to_thread(started[-1].start)


async def compute_in_python() -> None:
    """What any thread of Python code does to an event loop, for as long as a start takes."""
    over = time.perf_counter() + 0.5

    def compute() -> None:
        while time.perf_counter() < over:
            sum(range(1000))

    await asyncio.to_thread(compute)


async def worst_lag_ms(work: Callable[[], Awaitable[Any]]) -> float:
    """How late the latest beat of a heartbeat comes while `work` runs."""
    lags: list[float] = []

    async def beat() -> None:
        while True:
            due = time.perf_counter() + PERIOD_S
            await asyncio.sleep(PERIOD_S)
            lags.append(1000 * (time.perf_counter() - due))

    beating = asyncio.create_task(beat())
    await work()
    await asyncio.sleep(2 * PERIOD_S)
    beating.cancel()
    return max(lags)


@pytest.fixture
def frozen_heap() -> Iterator[None]:
    """Collections of garbage look at what the test makes only, not at all that the process has imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen_heap")
async def test_a_heartbeat_of_the_program_is_on_time_while_an_engine_starts() -> None:
    """Each of three copies of a tokenizer stopped the program's event loop for up to 0.3 s.

    The control is a thread of Python code beside the loop, in the same minute: what other programs of the machine do
    to the one they do to the other.
    """
    started: list[InferenceEngine] = []
    measured: list[tuple[float, float]] = []
    try:
        await start_engine(started)
        for _ in range(ATTEMPTS):
            calm = await worst_lag_ms(compute_in_python)
            measured.append((calm, await worst_lag_ms(lambda: start_engine(started))))
            if measured[-1][1] <= LATE_MS + calm:
                return
    finally:
        for engine in started:
            await asyncio.to_thread(engine.stop, 0.0)
    pytest.fail(f"(control, start) in milliseconds: {measured}")
