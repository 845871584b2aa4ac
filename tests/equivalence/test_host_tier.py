"""K/V that went to the host and came back give the tokens of transformers running one request at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.cache.readback import ReadBack
from penstock.sampling import RequestPriority, SamplingParams
from tests.drive import Driver, greedy_by_transformers, logprobs_by_transformers, prompts, sequence
from tests.tiny_models import VOCAB, build

PROMPTS = prompts(16, 200, VOCAB, seed=3)
NEW_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
SMALL: dict[str, dict[str, Any]] = {
    "panels of slots": {"block_size": 4, "num_blocks": 64, "num_host_blocks": 500},
    "whole panels": {"block_size": 16, "num_blocks": 18, "num_host_blocks": 200},
    "whole panels, small tier": {"block_size": 16, "num_blocks": 18, "num_host_blocks": 40},
    "no sharing between requests": {
        "block_size": 16,
        "num_blocks": 18,
        "num_host_blocks": 200,
        "enable_kv_cache": False,
    },
    "plain torch": {"block_size": 4, "num_blocks": 64, "num_host_blocks": 500, "disabled_rewrites": ("kernels",)},
}


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A saved model, and the outputs and logprobs that transformers gives for every prompt."""
    folder, model = tmp_path_factory.mktemp(request.param), build(request.param)
    model.save_pretrained(folder)
    outputs = [greedy_by_transformers(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    scores = [logprobs_by_transformers(model, prompt, out) for prompt, out in zip(PROMPTS, outputs, strict=True)]
    return folder, (outputs, scores)


@pytest.fixture(autouse=True)
def moving_seems_cheaper_than_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as no step was timed: the times of such small models depend on what else the machine does."""
    monkeypatch.setattr(ReadBack, "learn", lambda *_: None)


def run_twice(driver: Driver) -> list[list[list[int]]]:
    """All prompts, and all once more; half of them arrive later and take the others' blocks."""
    found = []
    for start in (0, 100):
        ranks = (RequestPriority.LOW, RequestPriority.HIGH)
        crowd = [sequence(start + i, prompt, GREEDY, priority=ranks[i % 2]) for i, prompt in enumerate(PROMPTS)]
        driver.run(crowd[::2], late=crowd[1::2])
        found.append([seq.tokens[seq.prompt_len :] for seq in crowd])
    assert driver.scheduler.stats()["num_preemptions"] > 0
    assert driver.cache.stats()["swapped_in"] > 0
    return found


@pytest.mark.parametrize("setting", SMALL)
def test_requests_in_a_small_cache_give_the_tokens_they_give_alone(checkpoint: tuple[Path, Any], setting: str) -> None:
    folder, (outputs, scores) = checkpoint
    driver = Driver(str(folder), **SMALL[setting])
    assert run_twice(driver) == [outputs, outputs]
    for i, expected in enumerate(scores):
        assert [entry.logprob for entry in driver.logprobs[i]] == pytest.approx(expected, abs=1e-4)


def test_int8_keys_and_values_come_back_unchanged(checkpoint: tuple[Path, Any]) -> None:
    folder, _ = checkpoint
    roomy = Driver(str(folder), block_size=16, kv_cache_dtype="int8")
    expected = roomy.run([sequence(i, prompt, GREEDY) for i, prompt in enumerate(PROMPTS)])
    assert roomy.scheduler.stats()["num_preemptions"] == 0
    tight = Driver(str(folder), **SMALL["whole panels"], kv_cache_dtype="int8")
    assert run_twice(tight) == [expected, expected]
    for i in range(len(PROMPTS)):
        assert tight.logprobs[i] == roomy.logprobs[i]
