"""Scores are what a plain forward pass of transformers gives, unpadded, whatever else the engine does meanwhile."""

from __future__ import annotations

import asyncio
import random
import weakref
from collections.abc import Callable
from functools import cache
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from penstock import ExecutionError, InferenceEngine, RequestHandle, SamplingParams, Score
from penstock.scores import joined
from penstock.scoring import ScoringParams
from tests.drive import Driver, greedy_by_transformers, prompts, sequence
from tests.tiny_models import VOCAB, build

ARCHITECTURES = ("llama", "qwen3", "gemma2", "gpt2", "mistral")
ENGINE: dict[str, Any] = {"skip_tokenizer_init": True, "max_sequence_length": None, "batch_timeout_ms": 0}
TEXTS = [text for text in prompts(16, 120, VOCAB, seed=4) if len(text) > 1]
PAIRS = [
    (text[: max(1, len(text) * (i % 4) // 4)], text[max(1, len(text) * (i % 4) // 4) :]) for i, text in enumerate(TEXTS)
]
PROMPTS, COMPLETIONS = [prompt for prompt, _ in PAIRS], [completion for _, completion in PAIRS]


@cache
def model_of(name: str) -> Any:
    return build(name)


@cache
def logits_by_transformers(name: str, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """The logits in front of each token of a completion, by one plain forward pass over one text: float64 [R, V]."""
    with torch.inference_mode():
        logits = model_of(name)(torch.tensor([prompt + completion])).logits[0].double()
    return logits[len(prompt) - 1 : -1]


def logprobs_by_transformers(name: str, prompt: list[int], completion: list[int]) -> np.ndarray:
    rows = logits_by_transformers(name, tuple(prompt), tuple(completion)).log_softmax(-1)
    return rows[torch.arange(len(completion)), torch.tensor(completion)].numpy()


def largest_error(scores: list[Score], name: str, pairs: list[tuple[list[int], list[int]]]) -> float:
    """The largest difference of any log probability of any completion."""
    assert [len(score) for score in scores] == [len(completion) for _, completion in pairs]
    exact = [logprobs_by_transformers(name, *pair) for pair in pairs]
    return max(float(np.abs(score.logprobs - each).max()) for score, each in zip(scores, exact, strict=True))


def difference(scores: list[Score], others: list[Score]) -> float:
    return max(float(np.abs(a.logprobs - b.logprobs).max()) for a, b in zip(scores, others, strict=True))


async def until(condition: Callable[[], bool]) -> None:
    """Let the engine work until the condition holds."""
    while not condition():  # noqa: ASYNC110 - the engine's thread signals no event
        await asyncio.sleep(0.001)


async def scored_together(engine: InferenceEngine, submit: Callable[[], None] = lambda: None) -> list[Score]:
    """The scores of all pairs, which have arrived before the first step, and so has what `submit` submits."""
    await engine.pause()
    scoring = asyncio.create_task(engine.score(PROMPTS, COMPLETIONS))
    await until(lambda: engine.get_stats()["queue"]["num_waiting"] == len(PROMPTS))
    submit()
    await engine.resume()
    return await scoring


@pytest.mark.parametrize("rewrites", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
async def test_ragged_batches_are_scored_as_each_text_alone(name: str, rewrites: bool, tmp_path: Path) -> None:
    model_of(name).save_pretrained(tmp_path)
    off = () if rewrites else ("kernels", "fused_layers", "packed_linears", "packed_norms")
    async with InferenceEngine(str(tmp_path), **ENGINE, disabled_rewrites=off) as engine:
        scores = await engine.score(PROMPTS, COMPLETIONS, logits=True, entropies=True)
    assert largest_error(scores, name, PAIRS) < 1e-5
    for score, (prompt, completion) in zip(scores, PAIRS, strict=True):
        exact = logits_by_transformers(name, tuple(prompt), tuple(completion))
        assert score.logits.shape == (len(completion), VOCAB)
        assert np.abs(score.logits - exact.numpy()).max() < 1e-4
        entropies = -(exact.log_softmax(-1).exp() * exact.log_softmax(-1)).sum(-1)
        assert np.abs(score.entropies - entropies.numpy()).max() < 1e-5


def num_cached(prompt: list[int], completion: list[int]) -> int:
    """Tokens in blocks of 4 that a repeated score finds: all but the last of the prompt, if its block is full."""
    is_full = -(-(len(prompt) - 1) // 4) * 4 <= len(prompt + completion)
    return len(prompt) - 1 if is_full else (len(prompt) - 1) // 4 * 4


@pytest.mark.parametrize("name", ARCHITECTURES)
async def test_chunks_and_cached_prefixes_change_nothing(name: str) -> None:
    """However many steps a completion takes, by tokens or by logits, and whatever the cache already holds."""
    results = []
    for settings in (
        {},
        {"max_num_batched_tokens": 7},
        {"logits_chunk_bytes": 4 * VOCAB},
        {"logits_chunk_bytes": 4 * VOCAB * 10},
    ):
        async with InferenceEngine(model_of(name), **ENGINE, **settings, block_size=4) as engine:
            cold = await engine.score(PROMPTS, COMPLETIONS)
            hits = engine.get_stats()["cache_info"]["hit_tokens"]
            warm = await engine.score(PROMPTS, COMPLETIONS)
            num_reusable = sum(starmap(num_cached, PAIRS))
            assert engine.get_stats()["cache_info"]["hit_tokens"] - hits == num_reusable > 200
        assert largest_error(cold, name, PAIRS) < 1e-5
        assert difference(warm, cold) < 1e-6
        results.append(cold)
    assert max(difference(result, results[0]) for result in results) < 1e-5


async def test_a_prompt_that_was_generated_from_serves_the_score_of_its_output() -> None:
    async with InferenceEngine(model_of("llama"), **ENGINE, block_size=4) as engine:
        output = await engine.generate(TEXTS[-1][:100], SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
        hits = engine.get_stats()["cache_info"]["hit_tokens"]
        await engine.score(TEXTS[-1][:100], output.generated_ids)
        assert engine.get_stats()["cache_info"]["hit_tokens"] - hits == 99, "all in front of the range but one"


async def test_a_score_finds_no_prefix_of_another_namespace() -> None:
    async with InferenceEngine(model_of("llama"), **ENGINE, block_size=4) as engine:
        for namespace, num_cached in (("a", 0), ("b", 0), ("a", 80)):
            hits = engine.get_stats()["cache_info"]["hit_tokens"]
            await engine.score(TEXTS[-1][:81], [5, 6], namespace=namespace)
            assert engine.get_stats()["cache_info"]["hit_tokens"] - hits == num_cached


async def test_weights_changed_in_place_show_in_the_next_score() -> None:
    """T4: nothing of the old weights is read again once the cache is reset."""
    model = build("llama")
    async with InferenceEngine(model, **ENGINE, block_size=4) as engine:
        before = await scored_together(engine)
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
        engine.reset_prefix_cache()
        after = await scored_together(engine)
    async with InferenceEngine(model, **ENGINE, block_size=4) as engine:
        assert difference(after, await scored_together(engine)) == 0
    assert difference(after, before) > 0.01


async def test_a_group_computes_its_shared_prompt_once() -> None:
    async with InferenceEngine(model_of("llama"), **ENGINE, block_size=4) as engine:
        prompt, group = TEXTS[-1][:81], [[2 + i, 3, 4] for i in range(8)]
        scores = await engine.score([prompt] * 8, group)
        assert engine.get_stats()["cache_info"]["hit_tokens"] == 7 * 80
    assert largest_error(scores, "llama", [(prompt, completion) for completion in group]) < 1e-5


@pytest.mark.usefixtures("steps_cost_the_same")
@pytest.mark.parametrize("name", ["llama", "gemma2"])
async def test_a_crowd_that_generates_speculates_and_is_preempted_changes_nothing(name: str) -> None:
    """The cache holds a fraction of the crowd, prompts take several steps, and drafts are verified meanwhile."""
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    tight = {**ENGINE, "kv_cache_tokens": 256, "block_size": 4, "max_num_batched_tokens": 24}
    speculating = {"enable_speculative_decoding": True, "drafter": "ngram", "speculation_length": 3}
    async with InferenceEngine(model_of(name), **tight, **speculating) as engine:
        handles: list[RequestHandle] = []
        scores = await scored_together(engine, lambda: handles.extend(engine.generate(text, params) for text in TEXTS))
        generated = await asyncio.gather(*handles)
        stats = engine.get_stats()
        assert stats["queue"]["num_preemptions"] > 0
        assert stats["totals"]["drafted_tokens"] > 0
    assert largest_error(scores, name, PAIRS) < 1e-5
    assert [out.generated_ids for out in generated] == [greedy_by_transformers(model_of(name), t, 30) for t in TEXTS]


async def test_a_preempted_score_is_whole() -> None:
    """An arrival of a higher class takes the blocks of a completion of which some steps are done."""
    text, params = [2 + i % 150 for i in range(200)], SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    tight = {**ENGINE, "kv_cache_tokens": 256, "block_size": 4, "max_num_batched_tokens": 20}
    async with InferenceEngine(model_of("llama"), **tight) as engine:
        for _ in range(20):  # it may end before the other one arrives
            scoring = asyncio.create_task(engine.score(text[:50], text[50:], priority=1))
            await until(lambda task=scoring: task.done() or engine.get_stats()["queue"]["num_running"] > 0)
            await engine.generate(text[:100], params, priority=4)
            scores = await scoring
            if engine.get_stats()["queue"]["num_preemptions"] > 0:
                break
        assert engine.get_stats()["queue"]["num_preemptions"] > 0
        assert engine.get_stats()["cache_info"]["usage"] == 0
    assert largest_error(scores, "llama", [(text[:50], text[50:])]) < 1e-5


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.5, "top_p": 0.9},
    {"temperature": 1.4, "top_k": 20, "repetition_penalty": 1.3},
    {"top_p": 0.7, "min_p": 0.02, "min_tokens": 10, "stop_token_ids": [5]},
]


@pytest.mark.parametrize("way", SAMPLED)
async def test_in_deterministic_mode_scores_are_the_bits_of_the_generation(way: dict[str, Any]) -> None:
    """Raw and tempered, cold and cached, in another batch than the one that generated."""
    settings = {**ENGINE, "deterministic": True, "weight_mode": "packed"}
    async with InferenceEngine(model_of("qwen3"), **settings) as engine:
        params = [SamplingParams(**way, max_tokens=24, seed=i) for i in range(len(TEXTS))]
        outputs = await asyncio.gather(*map(engine.generate, TEXTS, params))
        completions = [output.outputs[0] for output in outputs]
        for _ in range(2):
            scores = await engine.score(TEXTS, [out.token_ids for out in completions], params=params[0])
            for score, out in zip(scores, completions, strict=True):
                assert score.logprobs.tolist() == np.float32(out.token_logprobs).tolist()
                assert score.tempered.tolist() == np.float32(out.sampled_logprobs).tolist()
            engine.reset_prefix_cache()


@pytest.mark.parametrize(
    ("report", "way"),
    [
        ("T1", {"top_p": 0.9}),
        ("T1", {"top_p": 0.6, "top_k": 30}),
        ("T2", {"temperature": 0.7}),
        ("T2", {"temperature": 2.0}),
    ],
)
async def test_t1_t2_the_ratio_to_what_was_sampled_is_1_under_filters_and_temperature(
    report: str, way: dict[str, Any]
) -> None:
    """T1: with top-p it was the kept mass, 0.896. T2: at another temperature it was 2.0."""
    params = SamplingParams(**way, max_tokens=60, ignore_eos=True, seed=1)
    async with InferenceEngine(model_of("llama"), **ENGINE) as engine:
        outputs = await asyncio.gather(*(engine.generate(text, params) for text in TEXTS))
        scores = await engine.score(TEXTS, [output.generated_ids for output in outputs], params=params)
    sampled = np.concatenate([output.outputs[0].sampled_logprobs for output in outputs])
    raw = np.concatenate([output.outputs[0].token_logprobs for output in outputs])
    ratios = np.exp(np.concatenate([score.tempered for score in scores]) - sampled)
    assert ratios.mean() == pytest.approx(1.0, abs=1e-6)
    assert ratios == pytest.approx(1.0, abs=1e-4)
    assert np.concatenate([score.logprobs for score in scores]) == pytest.approx(raw, abs=1e-5)
    assert np.abs(np.exp(raw - sampled) - 1.0).mean() > 0.05, "raw ratios are others"


async def test_t16_a_nan_ends_its_own_score_with_an_error_and_no_other() -> None:
    """T16: NaN log probabilities crashed the training."""
    model = build("llama")
    async with InferenceEngine(model, **ENGINE) as engine:
        with torch.no_grad():
            model.get_input_embeddings().weight[7] = torch.nan
        healthy = asyncio.create_task(engine.score([[5, 6]] * 3, [[8, 9, 10]] * 3))
        with pytest.raises(ExecutionError, match="NaN or infinite"):
            await engine.score([[5, 6], [5, 6]], [[8, 9], [8, 7, 9]])
        for score in await healthy:
            assert np.isfinite(score.logprobs).all()
        assert engine.get_stats()["cache_info"]["usage"] == 0


async def test_t20_scores_are_constant_over_200_rounds_however_the_completions_are_ordered() -> None:
    """T20: "drift" at learning rate 0 was a wrong index into a shuffled batch."""
    rng, order = random.Random(0), [*range(8)]
    pairs = [(TEXTS[-1][:30], TEXTS[i][: 3 + i]) for i in order]
    async with InferenceEngine(model_of("llama"), **ENGINE, deterministic=True, weight_mode="packed") as engine:
        expected = await engine.score([prompt for prompt, _ in pairs], [completion for _, completion in pairs])
        for _ in range(200):
            rng.shuffle(order)
            scores = await engine.score([pairs[i][0] for i in order], [pairs[i][1] for i in order])
            assert all((score.logprobs == expected[i].logprobs).all() for score, i in zip(scores, order, strict=True))
    assert largest_error(expected, "llama", pairs) < 1e-5


async def test_scoring_again_and_again_leaks_nothing() -> None:
    async with InferenceEngine(model_of("llama"), **ENGINE) as engine:
        references = []
        for _ in range(3):
            scores = await engine.score(PROMPTS, COMPLETIONS, params=SamplingParams(top_p=0.9), logits=True)
            references += [weakref.ref(score.logits) for score in scores]
        del scores
        stats = engine.get_stats()
        assert (stats["cache_info"]["usage"], stats["queue"]["num_requests"]) == (0, 0)
        await until(lambda: not any(reference() is not None for reference in references))


class LiveBytes(TorchDispatchMode):
    """The bytes of tensors alive that were made inside its block, and the most there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        if storage.data_ptr() in self._storages:
            return
        self._storages.add(storage.data_ptr())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage.data_ptr(), storage.nbytes())

    def _drop(self, key: int, num_bytes: int) -> None:
        self._storages.discard(key)
        self.now -= num_bytes


MIB = 1024**2
WIDE: dict[str, Any] = {
    **{"vocab_size": 152_000, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"intermediate_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 8192},
}
SCORINGS = [
    ScoringParams(num_scored=8000),
    ScoringParams(num_scored=100, wants_entropies=True),
    ScoringParams(num_scored=60, tempers=True, temperature=0.7, top_p=0.9),
    ScoringParams(num_scored=60, tempers=True, temperature=0.7, top_k=50, repetition_penalty=1.2),
]


def test_the_tensors_of_a_step_are_counted_while_they_live() -> None:
    with LiveBytes() as live:
        values = torch.empty(1000, dtype=torch.float32)
        view = values.view(10, 100)
        copy = view + 1
        del values, copy
        assert (live.now, live.peak) == (4000, 8000)
        del view
        assert live.now == 0


def test_8000_tokens_of_a_vocabulary_of_152000_are_scored_within_the_byte_budget() -> None:
    """All their logits would take 4.9 GB. With entropies or filters a step takes no more than its share either."""
    budget = 64 * MIB
    rows = budget // (4 * WIDE["vocab_size"])
    driver = Driver(
        build("llama", **WIDE), num_blocks=640, block_size=16, logits_chunk_bytes=budget, max_logit_rows=rows
    )
    for number, params in enumerate(SCORINGS):
        seq = sequence(number, [2 + i % 997 for i in range(params.num_scored + 1)], params)
        with LiveBytes() as live:
            driver.run([seq])
        assert budget // 4 < live.peak < budget
        assert len(joined(driver.score_parts.pop(number))) == params.num_scored
        assert live.now == 0
