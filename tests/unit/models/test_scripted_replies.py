"""`ScriptedReplies`: answers in order, or by what the prompt contains."""

from __future__ import annotations

from typing import Any

import pytest

from penstock import InferenceEngine, SamplingParams
from penstock.models.scripted_replies import ScriptedReplies
from tests.letters import LetterTokenizer


def model(replies: Any) -> ScriptedReplies:
    """Letters are tokens; "z" ends a reply."""
    letters = LetterTokenizer()
    return ScriptedReplies(
        *(replies, lambda text: [ord(letter) - ord("a") for letter in text], letters.decode), eos=25, vocab_size=26
    )


async def texts(replies: Any, *prompts: list[int]) -> list[list[int]]:
    """The tokens of the answers, one request after another."""
    async with InferenceEngine(model(replies), skip_tokenizer_init=True) as engine:
        params = SamplingParams(max_tokens=8)
        return [(await engine.generate(prompt, params)).generated_ids for prompt in prompts]


async def test_a_list_is_gone_through_over_and_over() -> None:
    assert await texts(["ab", "", "c"], [1], [2], [3], [4]) == [[0, 1, 25], [25], [2, 25], [0, 1, 25]]


async def test_of_a_mapping_the_text_that_comes_last_in_the_prompt_counts() -> None:
    replies = {"cat": "a", "dog": "b", "": "c"}
    cat, dog = [2, 0, 19], [3, 14, 6]
    assert await texts(replies, [*dog, *cat], [*cat, *dog, 1], [1]) == [[0, 25], [1, 25], [2, 25]]
    assert await texts({"cat": "a"}, [1]) == [[25]]


async def test_every_sample_has_a_reply_and_none_is_kept() -> None:
    scripted = model(["ab", "c"])
    async with InferenceEngine(scripted, skip_tokenizer_init=True) as engine:
        output = await engine.generate([1], SamplingParams(n=2, max_tokens=8))
        assert [out.token_ids for out in output.outputs] == [[0, 1, 25], [2, 25]]
        assert [out.finish_reason for out in output.outputs] == ["stop", "stop"]


@pytest.mark.parametrize("replies", [[], {}])
def test_no_replies_are_refused(replies: Any) -> None:
    with pytest.raises(ValueError, match="no replies"):
        model(replies)
