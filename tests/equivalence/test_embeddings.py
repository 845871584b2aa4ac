"""Embeddings are what transformers' last hidden states give, pooled, whatever else the engine does meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from penstock import DeadlineExceeded, InferenceEngine, SamplingParams
from tests.drive import greedy_by_transformers, prompts
from tests.tiny_models import ARCHITECTURES, VOCAB, build

PROMPTS = prompts(16, 120, VOCAB, seed=4)
ENGINE: dict[str, Any] = {"skip_tokenizer_init": True, "max_sequence_length": None, "batch_timeout_ms": 0}


async def until(condition: Callable[[], bool]) -> None:
    """Let the engine work until the condition holds."""
    while not condition():  # noqa: ASYNC110 - the engine's thread signals no event
        await asyncio.sleep(0.001)


def by_transformers(model: Any, prompt: list[int], pooling: str) -> torch.Tensor:
    """The pooled hidden states after the last norm, normalized."""
    with torch.inference_mode():
        states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0].double()
    vector = states.mean(0) if pooling == "mean" else states[-1]
    return vector / vector.norm()


def largest_error(outputs: list[Any], model: nn.Module, texts: list[list[int]], pooling: str) -> float:
    """The largest difference of any number of any embedding."""
    assert [output.prompt_token_ids for output in outputs] == texts
    expected = torch.stack([by_transformers(model, text, pooling) for text in texts])
    return float((torch.tensor([output.embedding for output in outputs], dtype=torch.float64) - expected).abs().max())


@pytest.mark.parametrize("rewrites", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
async def test_embeddings_are_those_of_transformers(name: str, rewrites: bool, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    off = () if rewrites else ("kernels", "fused_layers", "packed_linears", "packed_norms")
    # Prompts take up to four steps of 32 tokens.
    settings = {**ENGINE, "max_num_batched_tokens": 32, "disabled_rewrites": off}
    async with InferenceEngine(str(tmp_path), **settings) as engine:
        for pooling in ("mean", "last"):
            outputs = await engine.embed(PROMPTS, pooling=pooling)
            assert largest_error(outputs, model, PROMPTS, pooling) < 1e-5


@pytest.mark.parametrize("pooling", ["mean", "last"])
async def test_neighbours_that_generate_change_nothing_and_are_not_changed(pooling: str) -> None:
    """The cache holds a fraction of the crowd, so that sequences of both kinds are preempted."""
    model, params = build("qwen3"), SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    tight = {**ENGINE, "kv_cache_tokens": 256, "block_size": 4, "max_num_batched_tokens": 24}
    async with InferenceEngine(model, **tight) as engine:
        await engine.pause()  # so that all of them have arrived before the first step
        embedding = asyncio.create_task(engine.embed(PROMPTS, pooling=pooling))
        await until(lambda: engine.get_stats()["queue"]["num_waiting"] == len(PROMPTS))
        handles = [engine.generate(prompt, params) for prompt in PROMPTS]
        await engine.resume()
        embedded, *generated = await asyncio.gather(embedding, *handles)
        assert engine.get_stats()["queue"]["num_preemptions"] > 0
    assert largest_error(embedded, model, PROMPTS, pooling) < 1e-5
    assert [output.generated_ids for output in generated] == [greedy_by_transformers(model, p, 30) for p in PROMPTS]


async def test_a_preempted_prompt_is_pooled_from_its_beginning() -> None:
    """An arrival of a higher class takes the blocks of a prompt of which two of ten steps are done."""
    model, text = build("llama"), [2 + i % 150 for i in range(200)]
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    tight = {**ENGINE, "kv_cache_tokens": 256, "block_size": 4, "max_num_batched_tokens": 20}
    async with InferenceEngine(model, **tight) as engine:
        for _ in range(20):  # it may end before the other one arrives
            embedding = asyncio.create_task(engine.embed([text], priority=1))
            await until(lambda task=embedding: task.done() or engine.get_stats()["queue"]["num_running"] > 0)
            await engine.generate(text[:100], params, priority=4)
            output = await embedding
            if engine.get_stats()["queue"]["num_preemptions"] > 0:
                break
        assert engine.get_stats()["queue"]["num_preemptions"] > 0
    assert largest_error(output, model, [text], "mean") < 1e-5


async def test_a_cached_prefix_serves_the_last_token_and_never_a_mean() -> None:
    model, text = build("llama"), PROMPTS[-1]
    async with InferenceEngine(model, **ENGINE, block_size=4) as engine:
        for pooling, is_hit in (("last", False), ("last", True), ("mean", False), ("mean", False)):
            (output,) = await engine.embed([text], pooling=pooling)
            assert (output.num_cached_tokens > 0) is is_hit
            assert largest_error([output], model, [text], pooling) < 1e-5
        # What an embedding computed serves generation.
        assert (await engine.generate(text, SamplingParams(max_tokens=1))).num_cached_tokens > 0


async def test_dimensions_are_cut_before_the_vector_is_normalized() -> None:
    model, text = build("llama"), PROMPTS[-1]
    async with InferenceEngine(model, **ENGINE) as engine:
        (whole,) = await engine.embed([text], normalize=False)
        (cut,) = await engine.embed([text], dimensions=5)
        (raw,) = await engine.embed([text], dimensions=5, normalize=False)
    assert raw.embedding == whole.embedding[:5]
    first = torch.tensor(whole.embedding[:5], dtype=torch.float64)
    assert cut.embedding == pytest.approx((first / first.norm()).tolist(), abs=1e-9)


async def test_a_mean_does_not_depend_on_the_steps_of_its_prefill() -> None:
    model, results = build("llama"), []
    for size in (512, 7):
        async with InferenceEngine(model, **ENGINE, max_num_batched_tokens=size) as engine:
            results.append([output.embedding for output in await engine.embed(PROMPTS[-3:])])
    assert torch.allclose(torch.tensor(results[0]), torch.tensor(results[1]), rtol=0, atol=1e-6)


async def test_a_prompt_may_fill_the_whole_context() -> None:
    model, text = build("gpt2", n_positions=64), [2 + i for i in range(64)]
    async with InferenceEngine(model, **ENGINE) as engine:
        assert largest_error(await engine.embed([text]), model, [text], "mean") < 1e-5


async def test_ending_an_embedding_early_leaves_nothing_behind() -> None:
    model, text = build("llama"), [2 + i % 150 for i in range(400)]
    async with InferenceEngine(model, **ENGINE, max_num_batched_tokens=8, block_size=4) as engine:
        with pytest.raises(DeadlineExceeded):
            await engine.embed([text], deadline=1e-4)
        for _ in range(20):  # it may end before it is cancelled
            task = asyncio.create_task(engine.embed([text, text]))
            await until(lambda task=task: task.done() or engine.get_stats()["queue"]["num_running"] > 0)
            neighbour = asyncio.create_task(engine.embed(PROMPTS[-1:]))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task, neighbour])
            if task.cancelled():
                break
        assert task.cancelled()
        assert largest_error(await neighbour, model, PROMPTS[-1:], "mean") < 1e-5
        # The same prompt again: a sum that was left would be added to.
        assert largest_error(await engine.embed([text]), model, [text], "mean") < 1e-5
        await until(lambda: engine.get_stats()["queue"]["num_requests"] == 0)
        assert engine.get_stats()["cache_info"]["usage"] == 0


async def test_weights_that_are_not_finite_end_the_embedding_alone() -> None:
    model = build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    async with InferenceEngine(model, **ENGINE, verify_model=False) as engine:
        good, bad = await asyncio.gather(engine.embed([[3, 4, 5]]), engine.embed([[3, 7, 5]]), return_exceptions=True)
    assert "not finite" in str(bad)
    assert len(good[0].embedding) == 32  # type: ignore[index]
