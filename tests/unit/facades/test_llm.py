"""`LLM`: lists of prompts with shared or separate parameters, and conversations; a scripted model repeats 5, 6, 7."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from penstock.errors import RequestError
from penstock.facades.llm import LLM
from penstock.models.scripted import ScriptedModel
from penstock.outputs import EmbeddingOutput
from penstock.sampling import SamplingParams


@pytest.fixture
def llm() -> Iterator[LLM]:
    """An engine that takes prompts as token ids."""
    made = LLM(ScriptedModel([5, 6, 7], vocab_size=32, max_length=64), skip_tokenizer_init=True)
    yield made
    made.engine.stop(0.0)


def generated(llm: LLM, prompts: Any, params: Any = None) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def test_one_prompt_or_several(llm: LLM) -> None:
    params = SamplingParams(max_tokens=2)
    assert generated(llm, [1, 2], params) == [[5, 6]]
    assert generated(llm, [[1, 2], [3]], params) == [[5, 6], [5, 6]]
    assert generated(llm, {"prompt_token_ids": [1, 2]}, params) == [[5, 6]]
    assert generated(llm, ([1, 2], [3]), params) == [[5, 6], [5, 6]]


def test_results_come_in_the_order_of_the_prompts_each_with_its_own_parameters(llm: LLM) -> None:
    several = [SamplingParams(max_tokens=count) for count in (3, 1)]
    assert generated(llm, [[1], [2]], several) == [[5, 6, 7], [5]]
    outputs = llm.generate([[1], [2]], several, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [[1], [2]]


def test_there_is_a_set_of_parameters_for_each_prompt(llm: LLM) -> None:
    with pytest.raises((RequestError, ValueError)):
        generated(llm, [[1], [2]], [SamplingParams(max_tokens=1)])


def test_embeddings_are_those_of_the_engine(llm: LLM) -> None:
    async def embedded() -> list[EmbeddingOutput]:
        return await llm.engine.embed([[1, 2], [3]], pooling="last", dimensions=4, normalize=False)

    outputs = llm.embed([[1, 2], [3]], pooling="last", dimensions=4, normalize=False)
    assert outputs == asyncio.run(embedded())
    assert [len(output.embedding) for output in outputs] == [4, 4]
    with pytest.raises(RequestError, match="pooling"):
        llm.embed([1], pooling="max")


@pytest.mark.parametrize("several", [False, True])
def test_a_conversation_is_one_prompt(llm: LLM, several: bool) -> None:
    given: list[Any] = []
    llm.generate = lambda *arguments: given.extend(arguments) or []  # type: ignore[method-assign, func-returns-value]
    talk, params = [{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=1)
    llm.chat([talk, talk] if several else talk, params, use_tqdm=False)
    assert given == [[{"messages": talk}] * (2 if several else 1), params, False]
