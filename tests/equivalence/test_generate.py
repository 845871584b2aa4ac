"""Requests that are batched, chunked, cached, shared or preempted give the tokens of transformers one at a time."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from typing import Any

import pytest

from penstock.sampling import SamplingParams
from tests.drive import Driver, greedy_by_transformers, logprobs_by_transformers, prompts, sequence
from tests.tiny_models import ARCHITECTURES, VOCAB, build

NEW_TOKENS = 10
PROMPTS = prompts(24, 200, VOCAB)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
SETTINGS: dict[str, dict[str, Any]] = {
    "big cache": {},
    "preempting cache": {"num_blocks": 64, "enable_kv_cache": False},
    "chunks of 16": {"max_num_batched_tokens": 16},
    "whole panels, small cache": {"block_size": 16, "num_blocks": 18, "enable_kv_cache": False},
    "plain torch, preempting": {"disabled_rewrites": ("kernels",), "num_blocks": 64, "enable_kv_cache": False},
}


@cache
def model_of(name: str) -> Any:
    return build(name)


@cache
def folder_of(name: str) -> str:
    """The model as a checkpoint: one that the engine reads itself, and may rewrite."""
    folder = tempfile.mkdtemp(prefix=f"penstock-{name}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model_of(name).save_pretrained(folder)
    return folder


@cache
def expected(name: str) -> list[tuple[list[int], list[float]]]:
    logprobs = []
    for prompt in PROMPTS:
        output = greedy_by_transformers(model_of(name), prompt, NEW_TOKENS)
        logprobs.append((output, logprobs_by_transformers(model_of(name), prompt, output)))
    return logprobs


def check(name: str, driver: Driver, first_id: int = 0) -> None:
    sequences = [sequence(first_id + i, prompt, GREEDY) for i, prompt in enumerate(PROMPTS)]
    outputs = driver.run(sequences)
    for seq, output, (tokens, logprobs) in zip(sequences, outputs, expected(name), strict=True):
        assert output == tokens
        assert [entry.logprob for entry in driver.logprobs[seq.id]] == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_requests_in_a_batch_give_the_tokens_they_give_alone(name: str, setting: str) -> None:
    driver = Driver(folder_of(name), **SETTINGS[setting])
    check(name, driver)
    if "preempting" in setting:
        assert driver.scheduler.stats()["num_preemptions"] > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_warm_prefix_cache_changes_nothing(name: str) -> None:
    driver = Driver(folder_of(name), block_size=16)
    check(name, driver)
    before = driver.cache.stats()["hit_tokens"]
    check(name, driver, first_id=100)
    assert driver.cache.stats()["hit_tokens"] > before + 1000


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_siblings_draw_the_tokens_of_single_requests_with_their_index(name: str) -> None:
    params = SamplingParams(n=3, seed=7, temperature=0.8, top_p=0.9, max_tokens=NEW_TOKENS)
    together, alone = [], []
    crowd = Driver(model_of(name))
    for i, prompt in enumerate(PROMPTS[::4]):
        parent = sequence(10 * i, prompt, params, request_id=f"r{i}")
        together += [parent] + [
            sequence(10 * i + k, prompt, params, request_id=f"r{i}", sample_index=k, parent=parent) for k in (1, 2)
        ]
    outputs = crowd.run(together)
    single = Driver(model_of(name), enable_kv_cache=False)
    for seq in together:
        prompt = seq.tokens[: seq.prompt_len]
        alone += single.run([sequence(seq.id, prompt, params, sample_index=seq.sample_index)])
    assert outputs == alone
    assert len({tuple(output) for output in outputs}) > len(PROMPTS[::4])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_seeded_request_draws_the_same_alone_in_a_crowd_and_after_preemption(name: str) -> None:
    params = SamplingParams(seed=11, temperature=0.9, top_k=40, repetition_penalty=1.2, max_tokens=24)
    tight, single = Driver(model_of(name), num_blocks=64, enable_kv_cache=False), Driver(model_of(name))
    crowd = tight.run([sequence(i, prompt, params) for i, prompt in enumerate(PROMPTS)])
    assert tight.scheduler.stats()["num_preemptions"] > 0
    alone = [single.run([sequence(i, prompt, params)])[0] for i, prompt in enumerate(PROMPTS) if i % 3 == 0]
    assert crowd[::3] == alone


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_prompt_logprobs_are_those_of_a_plain_forward_pass(name: str) -> None:
    driver = Driver(model_of(name), max_num_batched_tokens=64)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=2)
    driver.run([sequence(i, prompt, params) for i, prompt in enumerate(PROMPTS[:6])])
    for i, prompt in enumerate(PROMPTS[:6]):
        logprobs = [entry.logprob for entry in driver.prompt_logprobs[i]]
        assert logprobs == pytest.approx(logprobs_by_transformers(model_of(name), prompt[:1], prompt[1:]), abs=1e-4)
