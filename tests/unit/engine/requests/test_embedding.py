"""`embed`: arguments, batches, errors. What the numbers are is compared with transformers in tests/equivalence."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest

from penstock import Embedder, EngineOverloaded, InferenceEngine, RequestError, RequestTooLarge, ScriptedModel
from penstock.models.protocol import ModelSpec
from penstock.step import StepPlan, StepResult


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": "max"}, "pooling must be"),
        ({"pooling": None}, "pooling"),
        ({"dimensions": 0}, "dimensions must be"),
        ({"dimensions": "3"}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
        ({"dimensions": 9}, "more than the 8"),
        ({"normalize": "yes"}, "normalize"),
        ({"deadline": "soon"}, "deadline"),
        ({"priority": 9}, "priority"),
        ({"namespace": 4}, "namespace"),
    ],
)
async def test_a_wrong_argument_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    async with InferenceEngine(ScriptedModel([5])) as engine:
        with pytest.raises(RequestError, match=message):
            await engine.embed([[1, 2]], **arguments)


@pytest.mark.parametrize("prompts", [5, object(), [[]], [[1], "x"], [[1], [2.5]], [None], ""])
async def test_prompts_that_are_none_are_refused_and_nothing_runs_on(prompts: Any) -> None:
    async with InferenceEngine(ScriptedModel([5])) as engine:
        with pytest.raises(RequestError):
            await engine.embed(prompts)
        assert engine.get_stats()["queue"]["num_requests"] == 0
        assert len(await engine.embed([[1], {"prompt_token_ids": [2]}])) == 2


async def test_a_single_prompt_gives_a_list_of_one_and_no_prompt_an_empty_list() -> None:
    async with InferenceEngine(ScriptedModel([5])) as engine:
        assert isinstance(engine, Embedder)
        (output,) = await engine.embed([3, 4])
        assert output.prompt_token_ids == [3, 4]
        assert math.hypot(*output.embedding) == pytest.approx(1)
        assert await engine.embed([]) == []


async def test_a_batch_beyond_the_queue_waits_for_its_own_prompts_only() -> None:
    model = ScriptedModel([5])
    async with InferenceEngine(model, max_queue_size=2, max_batch_size=2, batch_timeout_ms=0) as engine:
        outputs = await engine.embed([[number] for number in range(30)])
        assert [output.prompt_token_ids for output in outputs] == [[number] for number in range(30)]
        model.hold()
        num_plans, waiting = model.plans, [engine.generate([1])]
        while model.plans == num_plans:  # noqa: ASYNC110 - its step begins once its place in the queue is free
            await asyncio.sleep(0.001)
        waiting += [engine.generate([1]) for _ in range(2)]
        with pytest.raises(EngineOverloaded):
            await engine.embed([[1]])
        assert not any(handle.done() for handle in waiting)
        model.release()


async def test_a_prompt_that_cannot_fit_ends_its_batch() -> None:
    async with InferenceEngine(ScriptedModel([5], max_length=20)) as engine:
        with pytest.raises(RequestTooLarge, match="21 tokens and the limit is 20"):
            await engine.embed([[1], [1] * 21])
        assert len(await engine.embed([[1] * 20])) == 1


@pytest.mark.parametrize("strategy", ["naive", "bucketed", "memory_aware", "continuous"])
async def test_embeddings_and_generation_share_every_strategy_of_batching(strategy: str) -> None:
    async with InferenceEngine(ScriptedModel([5]), batching_strategy=strategy, max_num_batched_tokens=16) as engine:
        texts = [[1 + number] * (1 + 7 * number) for number in range(8)]
        outputs, *generated = await asyncio.gather(engine.embed(texts), *map(engine.generate, texts))
        assert [output.prompt_token_ids for output in outputs] == texts
        assert all(len(output.generated_ids) == 256 for output in generated)


class Patched(ScriptedModel):
    """A scripted model whose results are changed before the engine sees them."""

    def __init__(self, change: Callable[[StepResult], StepResult]) -> None:
        super().__init__([5])
        self._change = change

    def execute(self, plan: StepPlan) -> StepResult:
        return self._change(super().execute(plan))


async def test_a_runner_that_pools_nothing_is_an_error_of_the_embedding_alone() -> None:
    def without_vectors(result: StepResult) -> StepResult:
        return StepResult(tuple(row._replace(pooled=None) for row in result.rows))

    async with InferenceEngine(Patched(without_vectors)) as engine:
        with pytest.raises(Exception, match="pooled nothing"):
            await engine.embed([[1, 2]])
        assert len((await engine.generate([1])).generated_ids) == 256


async def test_a_model_without_hidden_states_is_refused() -> None:
    assert ModelSpec(name="m", vocab_size=9, max_length=9).hidden_size == 0
    async with InferenceEngine(ScriptedModel([5], hidden_size=0)) as engine:
        with pytest.raises(RequestError, match="no hidden states"):
            await engine.embed([[1, 2]])
