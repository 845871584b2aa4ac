"""The whole engine, threads and loop included, gives the tokens of transformers running one request at a time."""

from __future__ import annotations

import asyncio

import pytest

from penstock import InferenceEngine, SamplingParams
from tests.drive import greedy_by_transformers, prompts
from tests.tiny_models import VOCAB, build

PROMPTS = prompts(24, 200, VOCAB, seed=1)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
async def test_concurrent_callers_get_what_each_would_get_alone(name: str) -> None:
    model = build(name)
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    tight = {"kv_cache_tokens": 256, "block_size": 4, "max_num_batched_tokens": 64, "max_sequence_length": None}
    async with InferenceEngine(model, skip_tokenizer_init=True, **tight) as engine:
        await engine.pause()  # so that all of them have arrived before the first step
        handles = [engine.generate(prompt, params) for prompt in PROMPTS]
        await engine.resume()
        outputs = await asyncio.gather(*handles)
        assert engine.get_stats()["queue"]["num_preemptions"] > 0
    expected = [greedy_by_transformers(model, prompt, 30) for prompt in PROMPTS]
    assert [output.generated_ids for output in outputs] == expected


async def test_scoring_a_prompt_gives_the_same_cold_and_chunked() -> None:
    model, params = build("qwen3"), SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=3)
    results = []
    for settings in ({}, {"logits_chunk_bytes": 4 * VOCAB}, {"logits_chunk_bytes": 4 * VOCAB * 16}):
        async with InferenceEngine(model, skip_tokenizer_init=True, **settings) as engine:
            cold = await engine.generate(PROMPTS[-1], params)
            cached = await engine.generate(PROMPTS[-1], params)
        for output in (cold, cached):
            entries = output.prompt_logprobs or []
            assert len(entries) == len(PROMPTS[-1])
            assert entries[0] is None
            results.append([entry[token].logprob for entry, token in zip(entries[1:], PROMPTS[-1][1:], strict=True)])
    for result in results[1:]:
        assert result == pytest.approx(results[0], abs=1e-5)
