"""`score`: arguments, batches, errors, endings. tests/equivalence compares the numbers with transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from penstock import (
    LLM,
    DeadlineExceeded,
    EngineOverloaded,
    ExecutionError,
    GenerationConfig,
    InferenceEngine,
    RequestError,
    RequestPriority,
    RequestTooLarge,
    SamplingParams,
    ScriptedModel,
    StructuredOutputs,
)
from penstock.demo import MODEL_DIR
from penstock.step import StepPlan, StepResult

BEAMS = SamplingParams(use_beam_search=True, best_of=2, temperature=0.0)


async def until(condition: Callable[[], bool]) -> None:
    """Let the engine work until the condition holds."""
    while not condition():  # noqa: ASYNC110 - the engine's thread signals no event
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": "yes"}, "logits must be"),
        ({"entropies": 2}, "entropies must be"),
        ({"deadline": "soon"}, "deadline"),
        ({"priority": 9}, "priority"),
        ({"namespace": 4}, "namespace"),
        ({"params": 4}, "params must be"),
        ({"params": BEAMS}, "does not apply use_beam_search"),
        ({"params": SamplingParams(structured_outputs=StructuredOutputs(choice=["a"]))}, "structured_outputs"),
        ({"params": SamplingParams(allowed_token_ids=[40000])}, "outside"),
    ],
)
async def test_a_wrong_argument_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    async with InferenceEngine(ScriptedModel([5])) as engine:
        with pytest.raises(RequestError, match=message):
            await engine.score([1, 2], [3], **arguments)
        assert engine.get_stats()["queue"]["num_requests"] == 0


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([1], [], "1 prompts and 0 completions"),
        ([[1], [2]], [[3]], "2 prompts and 1 completions"),
        ([1], [[2], [3]], "1 prompts and 2 completions"),
        ([[1], [2]], [[3], []], "completion 1 is refused: it has no token"),
        ([1], "", "completion 0 is refused: it has no token"),
        ([[]], [[1]], "empty"),
        ("", [1], "empty"),
        ([[1], [2]], [[3], [-1]], "completion 1 is refused: token ids must be at least 0"),
        ([1], [2.5], "completion 0 is refused"),
        ([1], [True], "not True or False"),
        ([1], [{"role": "user", "content": "x"}], "completion 0 is refused"),
        ([[1]], [None], "completion 0 is refused"),
        ([[1], [2]], [[3], None], "completion 1 is refused: it is None"),
        ([1], None, "completions must be texts"),
        ([1], [], "1 prompts and 0 completions.*an empty list of ids counts as none"),
        ([1], 5, "completions"),
        (None, [1], "prompt"),
        ([1], [40000], "outside the model's vocabulary"),
        ([40000], [1], "outside the model's vocabulary"),
        ([1], "text", "completion|token ids only"),
        ("text", [1], "token ids only"),
    ],
)
async def test_pairs_that_are_none_are_refused_and_nothing_runs_on(
    prompts: Any, completions: Any, message: str
) -> None:
    async with InferenceEngine(ScriptedModel([5])) as engine:
        with pytest.raises(RequestError, match=message):
            await engine.score(prompts, completions)
        assert engine.get_stats()["queue"]["num_requests"] == 0
        assert len(await engine.score([[1], {"prompt_token_ids": [2]}], [[2], (3, 4)])) == 2


async def test_one_pair_gives_a_list_of_one_and_no_pair_an_empty_list() -> None:
    async with InferenceEngine(ScriptedModel([5])) as engine:
        (score,) = await engine.score([3, 4], [5, 6, 7])
        assert score.logprobs.dtype == np.float32
        assert score.logprobs.shape == (3,)
        assert len(score) == 3
        assert (score.tempered, score.logits, score.entropies) == (None, None, None)
        assert await engine.score([], []) == []


@pytest.mark.parametrize("completion", [np.array([5, 6]), (5, 6), [np.int64(5), 6]])
async def test_a_completion_may_be_any_list_of_ids(completion: Any) -> None:
    async with InferenceEngine(ScriptedModel([5])) as engine:
        for scores in (await engine.score([3], completion), await engine.score([[3]], [completion])):
            assert [len(score) for score in scores] == [2]


@pytest.mark.parametrize("chunk_bytes", [4 * 100 * 2, 4 * 100 * 6, 2**28])
async def test_a_score_over_many_steps_is_joined_in_order(chunk_bytes: int) -> None:
    model = ScriptedModel([5], vocab_size=100)
    wanted: dict[str, Any] = {"params": SamplingParams(), "logits": True, "entropies": True}
    async with InferenceEngine(model, logits_chunk_bytes=chunk_bytes) as engine:
        (score,) = await engine.score([1, 2], [*range(60)], **wanted)
    assert model.plans >= (2 if chunk_bytes < 2**28 else 1)
    assert score.logits.argmax(-1).tolist() == [*range(60)]
    assert score.logits.shape == (60, 100)
    assert {array.shape for array in (score.logprobs, score.tempered, score.entropies)} == {(60,)}


async def test_a_pair_may_be_as_long_as_the_model_allows_and_no_longer() -> None:
    async with InferenceEngine(ScriptedModel([5], max_length=20), max_sequence_length=None) as engine:
        (score,) = await engine.score([1] * 15, [2] * 5, params=SamplingParams(max_tokens=400))
        assert len(score) == 5
        with pytest.raises(RequestTooLarge, match="prompt and completion have 21 tokens and the limit is 20"):
            await engine.score([[1], [1] * 15], [[2], [2] * 6])
        assert engine.get_stats()["queue"]["num_requests"] == 0


async def test_params_may_be_a_generation_config() -> None:
    async with InferenceEngine(ScriptedModel([5])) as engine:
        (score,) = await engine.score([1], [2, 3], params=GenerationConfig(temperature=0.5))
        assert len(score.tempered) == 2


async def test_a_batch_beyond_the_queue_waits_for_its_own_pairs_only() -> None:
    model = ScriptedModel([5])
    async with InferenceEngine(model, max_queue_size=2, max_batch_size=2, batch_timeout_ms=0) as engine:
        scores = await engine.score([[number] for number in range(30)], [[1] * (1 + number) for number in range(30)])
        assert [len(score) for score in scores] == [*range(1, 31)]
        model.hold()
        num_plans, waiting = model.plans, [engine.generate([1])]
        await until(lambda: model.plans > num_plans)  # its step begins once its place in the queue is free
        waiting += [engine.generate([1]) for _ in range(2)]
        with pytest.raises(EngineOverloaded):
            await engine.score([1], [2])
        assert not any(handle.done() for handle in waiting)
        model.release()


async def test_cancelling_a_score_frees_everything_it_held() -> None:
    model = ScriptedModel([5])
    async with InferenceEngine(model, max_batch_size=2) as engine:
        free = engine.get_stats()["cache_info"]["num_free_blocks"]
        model.hold()
        task = asyncio.create_task(engine.score([[1] * 40] * 6, [[2] * 40] * 6))
        await until(lambda: engine.get_stats()["queue"]["num_running"] > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        model.release()
        await until(lambda: engine.get_stats()["queue"]["num_requests"] == 0)
        await until(lambda: engine.get_stats()["cache_info"]["num_free_blocks"] == free)


async def test_a_deadline_covers_the_whole_batch() -> None:
    async with InferenceEngine(ScriptedModel([5])) as engine:
        with pytest.raises(DeadlineExceeded):
            await engine.score([[1], [2]], [[3], [4]], deadline=-1.0)
        assert len(await engine.score([[1], [2]], [[3], [4]], deadline=600.0)) == 2


async def test_a_score_of_a_higher_class_goes_first() -> None:
    model, order = ScriptedModel([5]), []

    async def scored(name: str, priority: RequestPriority) -> None:
        await engine.score([1], [2], priority=priority)
        order.append(name)

    # However slow the machine is, waiting lifts nobody to a higher class.
    settings = {"max_batch_size": 1, "batch_timeout_ms": 0, "priority_boost_threshold": 1e6}
    async with InferenceEngine(model, **settings) as engine:
        model.hold()
        blocker = engine.generate([1], SamplingParams(max_tokens=1))
        await until(lambda: engine.get_stats()["queue"]["num_running"] > 0)
        late = asyncio.create_task(scored("low", RequestPriority.LOW))
        await until(lambda: engine.get_stats()["queue"]["num_waiting"] == 1)
        early = asyncio.create_task(scored("high", RequestPriority.HIGH))
        await until(lambda: engine.get_stats()["queue"]["num_waiting"] == 2)
        model.release()
        await asyncio.gather(blocker, late, early)
    assert order == ["high", "low"]


@pytest.mark.parametrize("strategy", ["naive", "bucketed", "memory_aware", "continuous"])
async def test_scores_and_generation_share_every_strategy_of_batching(strategy: str) -> None:
    async with InferenceEngine(ScriptedModel([5]), batching_strategy=strategy, max_num_batched_tokens=16) as engine:
        texts = [[1 + number] * (2 + 7 * number) for number in range(8)]
        scores, *generated = await asyncio.gather(
            engine.score([text[:1] for text in texts], [text[1:] for text in texts]), *map(engine.generate, texts)
        )
        assert [len(score) for score in scores] == [len(text) - 1 for text in texts]
        assert all(len(output.generated_ids) == 256 for output in generated)


class Patched(ScriptedModel):
    """A scripted model whose results are changed before the engine sees them."""

    def __init__(self, change: Callable[[StepResult], StepResult]) -> None:
        super().__init__([5])
        self._change = change

    def execute(self, plan: StepPlan) -> StepResult:
        return self._change(super().execute(plan))


async def test_a_runner_that_scores_nothing_is_an_error_of_the_score_alone() -> None:
    def without_scores(result: StepResult) -> StepResult:
        return StepResult(tuple(row._replace(scores=None) for row in result.rows))

    async with InferenceEngine(Patched(without_scores)) as engine:
        with pytest.raises(ExecutionError, match="scored nothing"):
            await engine.score([1], [2])
        assert len((await engine.generate([1])).generated_ids) == 256


def test_texts_are_encoded_each_by_itself_and_only_the_prompt_gets_special_tokens() -> None:
    llm = LLM(str(MODEL_DIR))
    try:
        prompts, completions = ["def add(a, b):\n", "import os\n"], ["    return a + b\n", "print(os.name)\n"]
        tokenizer = llm.get_tokenizer()
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in completions]
        by_text = llm.score(prompts, completions)
        by_ids = llm.score([tokenizer.encode(text) for text in prompts], ids)
        mixed = llm.score(prompts[0], ids[0])
        assert [len(score) for score in by_text] == [len(each) for each in ids]
        for text, exact in zip(by_text, by_ids, strict=True):
            assert text.logprobs.tolist() == pytest.approx(exact.logprobs.tolist(), abs=1e-5)
        assert mixed[0].logprobs.tolist() == pytest.approx(by_ids[0].logprobs.tolist(), abs=1e-5)
    finally:
        llm.stop()
