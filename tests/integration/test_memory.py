"""Memory through the whole engine: the tier behind `swap_space`, and what `optimize_memory` gives back."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import pytest

from penstock import ConfigurationError, InferenceEngine, RequestPriority, SamplingParams, ScriptedModel
from tests.drive import greedy_by_transformers, prompts
from tests.held_passes import Served
from tests.tiny_models import VOCAB, build

LOW, HIGH = RequestPriority.LOW, RequestPriority.HIGH
SMALL: dict[str, Any] = {"kv_cache_tokens": 256, "block_size": 4, "max_num_batched_tokens": 64}


async def test_preempted_requests_come_back_from_the_host_with_the_same_tokens() -> None:
    model, texts = build("llama"), prompts(12, 150, VOCAB, seed=5)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    settings = {"skip_tokenizer_init": True, "max_sequence_length": None, "swap_space": 0.01, **SMALL}
    async with Served(model, **settings) as served:
        served.passes.arm(4)
        low = [served.engine.generate(text, params, priority=LOW) for text in texts[::2]]
        await anext(low[0])
        high = [served.engine.generate(text, params, priority=HIGH) for text in texts[1::2]]
        served.passes.release()  # only now may a request of the lower class end
        outputs = await asyncio.gather(*low, *high)
        stats = served.engine.get_stats()
    assert stats["queue"]["num_preemptions"] > 0
    assert stats["cache_info"]["swapped_out"] > 0
    expected = [greedy_by_transformers(model, text, 20) for text in (*texts[::2], *texts[1::2])]
    assert [output.generated_ids for output in outputs] == expected


async def test_an_evicted_prefix_is_read_back() -> None:
    first, other = ([number] * 200 for number in (3, 4))
    params = SamplingParams(temperature=0.0, max_tokens=1)
    async with InferenceEngine(ScriptedModel([5]), skip_tokenizer_init=True, swap_space=2**-15, **SMALL) as engine:
        outputs = [await engine.generate(prompt, params) for prompt in (first, other, first)]
        cache = engine.get_stats()["cache_info"]
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 196]
    assert (cache["num_blocks"], cache["num_host_blocks"]) == (64, 2**15 // 4)
    assert 0 < cache["swapped_in"] <= cache["swapped_out"] == cache["num_host_entries"]


def test_swap_space_that_holds_no_block_is_refused() -> None:
    engine = InferenceEngine(ScriptedModel([5]), skip_tokenizer_init=True, swap_space=1e-9)
    with pytest.raises(ConfigurationError, match="swap_space=1e-09 GiB has no room for a single block"):
        engine.start()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep their pages")
async def test_optimizing_memory_gives_the_memory_of_a_used_cache_back() -> None:
    """004-38: an engine whose cache was full once does not hold that memory for ever."""
    texts = [[3 + (7 * i + k) % 900 for k in range(1000)] for i in range(8)]
    params = SamplingParams(temperature=0.0, max_tokens=1)
    async with InferenceEngine(skip_tokenizer_init=True, kv_cache_tokens=16384, log_level="ERROR") as engine:
        before = [output.generated_ids for output in await asyncio.gather(*(engine.generate(t, params) for t in texts))]
        found = await asyncio.to_thread(engine.optimize_memory)
        assert found["freed_bytes"] > 10 * 2**20, "8,000 tokens of 3 KiB were in the cache"
        assert engine.get_stats()["cache_info"]["num_entries"] == 0
        after = [output.generated_ids for output in await asyncio.gather(*(engine.generate(t, params) for t in texts))]
    assert after == before


async def test_memory_can_be_optimized_from_the_engines_own_thread() -> None:
    """A logits processor runs where the work would have to wait for itself."""
    reports: list[dict[str, float]] = []

    def processor(_: Any, logits: Any) -> Any:
        reports.append(engine.optimize_memory())
        return logits

    model = build("llama")
    async with InferenceEngine(model, skip_tokenizer_init=True) as engine:
        output = await engine.generate([5, 6, 7], SamplingParams(max_tokens=2, logits_processors=(processor,)))
    assert output.finished
    assert [report["freed_bytes"] for report in reports] == [0] * len(output.generated_ids)


def test_an_engine_that_is_not_loaded_has_nothing_to_give() -> None:
    engine = InferenceEngine(ScriptedModel([5]), skip_tokenizer_init=True)
    assert engine.optimize_memory() == {"before": 0.0, "after": 0.0, "freed_bytes": 0}
    engine.start()
    assert engine.optimize_memory()["freed_bytes"] == 0
    engine.stop()
    assert engine.optimize_memory() == {"before": 0.0, "after": 0.0, "freed_bytes": 0}


class Narrow(ScriptedModel):
    """A machine with little memory."""

    def free_bytes(self) -> int:
        return 1000


def test_a_cache_that_does_not_fit_is_cut_with_a_warning_and_shows_in_the_figures(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It was cut without a word."""
    settings = {"memory_pool_size": 5000, "swap_space": 5000 / 2**30, "max_sequence_length": 4096}
    engine = InferenceEngine(Narrow([5, 6]), block_size=10, skip_tokenizer_init=True, **settings)
    with caplog.at_level(logging.WARNING, "penstock"):
        engine.start()
    figures = engine.get_stats()["cache_info"]
    assert (figures["num_blocks"], figures["num_wanted_blocks"]) == (90, 500)
    assert (figures["num_host_blocks"], figures["num_wanted_host_blocks"]) == (9, 500)
    assert "memory_pool_size=5000 is" in caplog.text
    assert "swap_space=" in caplog.text
    assert "the K/V cache holds 900 tokens: no sequence can reach max_sequence_length=4096" in caplog.text
    engine.stop()


def test_a_cache_that_does_not_fit_is_not_preallocated() -> None:
    engine = InferenceEngine(Narrow([5]), block_size=10, memory_pool_size=5000, preallocate_kv_cache=True)
    with pytest.raises(ConfigurationError, match="lower it, free memory, or leave preallocate_kv_cache out"):
        engine.start()
