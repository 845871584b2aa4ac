"""What `InferenceEngine` adds to every request, seen by a scripted model."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock.api.channel import RequestStatus
from penstock.engine.inference import InferenceEngine
from penstock.errors import RequestError, RequestTooLarge
from penstock.models.scripted import ScriptedModel
from penstock.sampling import SamplingParams
from penstock.step import StepPlan, StepResult
from tests.tokenizers_for_tests import byte_level


class Watched(ScriptedModel):
    """Records the seeds of the rows."""

    def __init__(self) -> None:
        super().__init__([5, 6, 7], vocab_size=32, max_length=64)
        self.seeds: list[int] = []

    def execute(self, plan: StepPlan) -> StepResult:
        self.seeds += [row.seed for row in plan.rows if row.samples]
        return super().execute(plan)


async def seeds_of(count: int, params: SamplingParams, **settings: Any) -> list[int]:
    """The seeds of so many requests of one token, one after another."""
    model = Watched()
    async with InferenceEngine(model, skip_tokenizer_init=True, **settings) as engine:
        for _ in range(count):
            await engine.generate([1, 2], params)
    return model.seeds


async def test_requests_without_a_seed_get_separate_seeds() -> None:
    params = SamplingParams(max_tokens=1)
    first, second = await asyncio.gather(seeds_of(4, params), seeds_of(4, params))
    assert len({*first, *second}) == 8


async def test_a_seed_of_the_engine_seeds_its_requests() -> None:
    params = SamplingParams(max_tokens=1)
    first, second = await asyncio.gather(seeds_of(4, params, seed=3), seeds_of(4, params, seed=3))
    assert first == second
    assert len(set(first)) == 4


async def test_a_seed_of_the_request_counts() -> None:
    assert await seeds_of(2, SamplingParams(max_tokens=1, seed=9)) == [9, 9]


async def test_a_handle_of_a_known_request_and_none_of_another() -> None:
    async with InferenceEngine(Watched(), skip_tokenizer_init=True) as engine:
        original = engine.generate([1], SamplingParams(max_tokens=2), request_id="a")
        await original
        assert (engine.get_request_status("a"), engine.get_request_status("b")) == (RequestStatus.COMPLETED, None)
        handle = engine.get_request("a")
        assert handle is not None
        assert (await handle).outputs[0].token_ids == [5, 6]
        assert engine.get_request("b") is None


async def test_tokenize_gives_the_ids_of_a_request_and_detokenize_their_text() -> None:
    tokenizer = byte_level()
    async with InferenceEngine(ScriptedModel([5], vocab_size=512), tokenizer) as engine:
        for prompt in ("water falls", {"prompt": "wäter"}, [{"role": "user", "content": "hi"}], [3, 4]):
            output = await engine.generate(prompt, SamplingParams(max_tokens=1))
            assert await engine.tokenize(prompt) == output.prompt_token_ids
        ids = await engine.tokenize("water falls", add_special_tokens=False)
        assert await engine.detokenize(ids) == "water falls"
        assert await engine.detokenize([1, *ids]) == "<s>water falls"
        assert await engine.detokenize([1, *ids, 499], skip_special_tokens=True) == "water falls"
        for invalid in ([-1], ["a"]):
            with pytest.raises(RequestError, match="ids"):
                await engine.detokenize(invalid)  # type: ignore[arg-type]


async def test_an_engine_of_token_ids_only_has_no_text() -> None:
    async with InferenceEngine(Watched(), skip_tokenizer_init=True) as engine:
        with pytest.raises(RequestError, match="token ids only"):
            await engine.tokenize("water")
        with pytest.raises(RequestError, match="token ids only"):
            await engine.detokenize([1])


async def test_a_refused_request_is_known_before_it_would_produce_anything() -> None:
    async with InferenceEngine(Watched(), skip_tokenizer_init=True) as engine:
        with pytest.raises(RequestTooLarge):
            await engine.generate([1] * 64).admitted()
        handle = engine.generate([1], SamplingParams(max_tokens=2))
        await handle.admitted()
        assert (await handle).generated_ids == [5, 6]
        await handle.admitted()
