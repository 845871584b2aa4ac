"""NaN and infinities end the requests that meet them, with their own error; nobody else loses a bit.

Each way of computing attention is tried: compiled kernels inside fused layers and beside the model's own modules,
plain torch with torch's attention and with ours, windows, soft caps, sinks, and every format of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from penstock import ExecutionError, InferenceEngine, RequestHandle, SamplingParams
from penstock.kernels.native import available
from tests.tiny_models import build

POISON = 100  # the token whose embedding is broken; nobody's probe at load reads it
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logit_bias={POISON: -1e9})
PLAIN = {"disabled_rewrites": ("kernels",)}
BF16, FP16 = torch.bfloat16, torch.float16
WAYS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "fused": ("llama", torch.float32, {"weight_mode": "packed"}),
    "fused, bfloat16": ("llama", BF16, {"weight_mode": "packed"}),
    "fused, float16": ("llama", FP16, {"weight_mode": "packed"}),
    "fused, int8 cache": ("llama", BF16, {"weight_mode": "packed", "kv_cache_dtype": "int8"}),
    "fused, ReLU": ("opt", torch.float32, {"weight_mode": "packed"}),
    "fused, windows and soft caps": ("gemma2", torch.float32, {"weight_mode": "packed"}),
    "kernels": ("llama", torch.float32, {}),
    "kernels, windows and sinks": ("gpt_oss", torch.float32, {}),
    "kernels, small blocks": ("mistral", torch.float32, {"block_size": 4}),
    "plain": ("llama", torch.float32, PLAIN),
    "plain, bfloat16": ("llama", BF16, PLAIN),
    "plain, windows": ("mistral", torch.float32, PLAIN),
    "plain, windows and soft caps": ("gemma2", torch.float32, PLAIN),
    "plain, windows and sinks": ("gpt_oss", torch.float32, PLAIN),
}


@contextmanager
def serving(way: str, **settings: Any) -> Iterator[tuple[nn.Module, InferenceEngine]]:
    """An engine over a tiny model, and the model."""
    name, dtype, options = WAYS[way]
    if options != PLAIN and not available():
        pytest.skip("no compiler")
    model = build(name, tie_word_embeddings=False).to(dtype)
    engine = InferenceEngine(
        model, skip_tokenizer_init=True, num_threads=1, verify_model=False, **{**options, **settings}
    )
    try:
        yield model, engine
    finally:
        engine.stop()


def break_embedding(model: nn.Module, number: float = torch.nan) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON, 3] = number  # type: ignore[operator]


def outcome(handle: RequestHandle) -> list[int] | ExecutionError:
    """The tokens, or the error that the request ended with."""
    try:
        return list(handle.result(60).outputs[0].token_ids)
    except ExecutionError as error:
        return error


def broken(found: list[int] | ExecutionError) -> bool:
    return isinstance(found, ExecutionError) and "NaN or infinite" in str(found)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("way", ["kernels", "kernels, windows and sinks", "plain", "plain, windows and soft caps"])
def test_weights_that_break_while_the_engine_serves_end_its_requests(way: str, number: float) -> None:
    """Values of NaN or infinity came out as the tokens of values of 0."""
    with serving(way) as (model, engine):
        assert not broken(outcome(engine.generate([5, 6, 7], GREEDY)))
        *_, last = (module for name, module in model.named_modules() if name.endswith("v_proj"))
        with torch.no_grad():
            last.weight[3] = number  # type: ignore[index, operator]
        assert broken(outcome(engine.generate([5, 6, 7], GREEDY)))


@pytest.mark.parametrize("way", WAYS)
def test_a_broken_prompt_in_chunks_leaves_every_neighbour_its_tokens(way: str) -> None:
    """In plain torch, short rows were padded with the first slot of the cache: 5 of 8 neighbours failed."""
    prompts = [[10 + i] * (3 + 5 * i) for i in range(6)]
    with serving(way, max_num_batched_tokens=48, enable_kv_cache=False) as (model, engine):
        break_embedding(model)
        sick = [engine.generate([POISON] * 150, GREEDY), engine.generate([9] * 60 + [POISON] + [8] * 6, GREEDY)]
        beside = [outcome(handle) for handle in [engine.generate(prompt, GREEDY) for prompt in prompts]]
        assert all(broken(outcome(handle)) for handle in sick)
        assert beside == [outcome(engine.generate(prompt, GREEDY)) for prompt in prompts]  # in the slots left behind
        assert not any(map(broken, beside))


@pytest.mark.parametrize(
    "way", [way for way in WAYS if "plain" in way] + ["fused, int8 cache", "kernels, small blocks"]
)
def test_blocks_before_a_broken_token_serve_whoever_shares_them(way: str) -> None:
    """In plain torch a masked token of the same chunk reached the tokens before it, and so the prefix cache."""
    prefix = [(7 * i) % 90 + 2 for i in range(40)]
    with serving(way) as (model, engine):
        alone = outcome(engine.generate([*prefix, 5, 6], GREEDY))
        repaired = outcome(engine.generate([*prefix, POISON, 5], GREEDY))
        engine.reset_prefix_cache()
        whole = model.get_input_embeddings().weight[POISON, 3].item()  # type: ignore[operator]
        break_embedding(model)
        assert broken(outcome(engine.generate([*prefix, POISON, 5], GREEDY)))
        handle = engine.generate([*prefix, 5, 6], GREEDY)
        assert outcome(handle) == alone
        assert handle.result(60).num_cached_tokens > 0
        break_embedding(model, whole)
        engine.reset_prefix_cache()
        assert outcome(engine.generate([*prefix, POISON, 5], GREEDY)) == repaired
        assert outcome(engine.generate([*prefix, 5, 6], GREEDY)) == alone


REQUESTS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"top_p": 0.5, "logprobs": 2},
    {"top_k": 5, "repetition_penalty": 1.2},
    {"n": 3, "temperature": 1.0},
    {"use_beam_search": True, "best_of": 3, "temperature": 0.0},
    {"use_beam_search": True, "best_of": 3, "temperature": 0.0, "logit_bias": {5: 1.0}},
    {"prompt_logprobs": 2},
)


@pytest.mark.parametrize("way", ["fused", "plain"])
async def test_requests_of_every_kind_end_with_the_error(way: str) -> None:
    """Scores were NaN."""
    with serving(way) as (model, engine):
        break_embedding(model)
        kinds = [SamplingParams(max_tokens=6, seed=1, **kind) for kind in REQUESTS]  # draws no broken token
        sick = [engine.generate([5, 6, POISON, 7], params) for params in kinds]
        healthy = [engine.generate([5, 6, 7, 8], params) for params in kinds]
        assert all(broken(outcome(handle)) for handle in sick)
        assert not any(broken(outcome(handle)) for handle in healthy)
        with pytest.raises(ExecutionError, match="NaN or infinite"):
            await engine.score([5, 6], [7, POISON, 8])
        (score,) = await engine.score([5, 6], [7, 8])
        assert len(score) == 2


def test_prompt_logprobs_that_are_no_numbers_end_a_request_whose_last_logits_are() -> None:
    """Behind a window, the logits of the last token know nothing of the broken one."""
    with serving("plain, windows") as (model, engine):
        break_embedding(model)
        prompt = [POISON] + [(3 * i) % 90 + 2 for i in range(40)]
        assert not broken(outcome(engine.generate(prompt, GREEDY)))
        for count in (1, 2):
            params = SamplingParams(max_tokens=2, prompt_logprobs=0, n=count)
            assert broken(outcome(engine.generate(prompt, params)))
        assert not broken(outcome(engine.generate(prompt, GREEDY)))


def drafting_settings(way: str, folder: Path) -> dict[str, Any]:
    build(WAYS[way][0]).save_pretrained(folder)
    return {"draft_model": str(folder), "enable_speculative_decoding": True}


SPECULATING: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    "n-grams": lambda way, folder: {"drafter": "ngram", "enable_speculative_decoding": True},
    "a draft model": drafting_settings,
}


@pytest.mark.parametrize("drafter", SPECULATING)
@pytest.mark.parametrize("way", ["fused", "plain"])
def test_guesses_that_are_broken_tokens_are_rejected_like_others(way: str, drafter: str, tmp_path: Path) -> None:
    """A row's drafts go through the model with it, masked for the tokens before them."""
    prompt = [5, 6, 7, POISON] * 3 + [9, 5, 6, 7]
    with serving(way, **SPECULATING[drafter](way, tmp_path)) as (model, engine):
        healthy = [(7 * i) % 90 + 2 for i in range(12)] * 2
        alone = outcome(engine.generate(healthy, GREEDY))
        break_embedding(model)
        sick = engine.generate(prompt, GREEDY)
        assert outcome(engine.generate(healthy, GREEDY)) == alone
        assert broken(outcome(sick))
