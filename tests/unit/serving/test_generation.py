"""`submit` and `Generation`: several prompts at once, refusals before anything runs, ends that leave nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

import pytest

from penstock import InferenceEngine, RequestAborted, RequestTooLarge, SamplingParams, ScriptedModel
from penstock.serving.generation import Generation, Options, Usage, submit, usage_of
from penstock.serving.metrics import Metrics
from tests.http_sockets import wait_until
from tests.tokenizers_for_tests import byte_level


@pytest.fixture(params=[64])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[InferenceEngine]:
    settings = {"skip_tokenizer_init": True, "batch_timeout_ms": 0, "max_sequence_length": request.param}
    async with InferenceEngine(ScriptedModel([5, 6, 7], step_s=0.002), **settings) as engine:
        yield engine


async def submitted(engine: InferenceEngine, *prompts: list[int], max_tokens: int | None = 5) -> Generation:
    params, metrics = SamplingParams(max_tokens=max_tokens, n=2), Metrics(engine, lambda: "m")
    with ExitStack() as cancels:
        handles = await submit(engine, prompts, params, Options(namespace="n"), "id", cancels, metrics)
        cancels.pop_all()
    return Generation(handles, metrics)


def num_requests(engine: InferenceEngine) -> int:
    return engine.get_stats()["queue"]["num_requests"]


async def test_the_deltas_of_several_prompts_come_mixed_and_add_up(engine: InferenceEngine) -> None:
    generation = await submitted(engine, [1], [2, 3])
    tokens: dict[tuple[int, int], list[int]] = {}
    async for number, delta in generation.deltas():
        tokens.setdefault((number, delta.index), []).extend(delta.token_ids)
    assert tokens == {key: [5, 6, 7, 5, 6] for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert generation.usage() == Usage(3, 20)
    outputs = await (await submitted(engine, [1], [2, 3])).outputs()
    assert (usage_of(outputs).prompt_tokens, usage_of(outputs).completion_tokens) == (3, 20)


async def test_a_refused_prompt_stops_the_others(engine: InferenceEngine) -> None:
    with pytest.raises(RequestTooLarge):
        await submitted(engine, [1], [2] * 64, [3])
    await asyncio.to_thread(wait_until, lambda: num_requests(engine) == 0)


async def test_too_many_tokens_are_cut_to_what_fits(engine: InferenceEngine) -> None:
    outputs = await (await submitted(engine, [1], [2] * 60, max_tokens=1000)).outputs()
    assert [len(output.generated_ids) for output in outputs] == [63, 4]


async def test_a_prompt_is_encoded_once_also_if_its_max_tokens_are_cut() -> None:
    """Clients that always send a large `max_tokens` had every prompt encoded twice."""
    prompts: list[object] = []
    async with InferenceEngine(
        ScriptedModel([5, 6, 7]), byte_level(), batch_timeout_ms=0, max_sequence_length=64
    ) as engine:
        generate = engine.generate

        def watched(prompt: Any, *args: Any, **options: Any) -> Any:
            prompts.append(prompt)
            return generate(prompt, *args, **options)

        engine.generate = watched  # type: ignore[method-assign]
        with ExitStack() as cancels:
            params, metrics = SamplingParams(max_tokens=1000), Metrics(engine, lambda: "m")
            (handle,) = await submit(engine, [{"prompt": "water"}], params, Options(), "id", cancels, metrics)
            output = await handle
    assert (output.prompt, len(output.generated_ids)) == ("water", 64 - len(output.prompt_token_ids))
    assert prompts == [{"prompt": "water"}, {"prompt": "water", "prompt_token_ids": output.prompt_token_ids}]


@pytest.mark.parametrize("num_prompts", [1, 2])
async def test_leaving_a_stream_ends_all_of_it(engine: InferenceEngine, num_prompts: int) -> None:
    generation = await submitted(engine, *[[1]] * num_prompts, max_tokens=None)
    deltas = generation.deltas()
    async for _ in deltas:
        break
    await deltas.aclose()  # type: ignore[attr-defined]
    await asyncio.to_thread(wait_until, lambda: num_requests(engine) == 0)


@pytest.mark.parametrize("engine", [100_000], indirect=True)
@pytest.mark.parametrize("num_prompts", [1, 2])
async def test_cancelling_ends_a_stream_with_an_error(engine: InferenceEngine, num_prompts: int) -> None:
    generation = await submitted(engine, *[[1]] * num_prompts, max_tokens=None)
    deltas = generation.deltas()
    await anext(deltas)
    generation.cancel()
    with pytest.raises(RequestAborted):
        [delta async for delta in deltas]
    with pytest.raises(RequestAborted):
        await generation.outputs()
