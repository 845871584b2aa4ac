"""Log probabilities in the shapes of the two APIs."""

from __future__ import annotations

import math

from pydantic_core import to_json

from penstock.outputs import Logprob
from penstock.serving.logprobs import CompletionLogprobs, chat_logprobs

ENTRY = {5: Logprob(-0.1, 1, "a"), 6: Logprob(-2.0, 2, "ä"), 7: Logprob(-math.inf, 9, "c")}


def test_an_impossible_token_has_a_number_that_json_can_hold() -> None:
    """It was a 500."""
    content = chat_logprobs([7], [ENTRY], 2)["content"]
    assert content[0]["logprob"] == -9999.0  # type: ignore[index]
    assert b"-9999" in to_json(content)
    assert CompletionLogprobs(0).add([7], [ENTRY])["token_logprobs"] == [-9999.0]


def test_the_most_likely_tokens_are_in_order_and_the_chosen_one_is_not_among_them() -> None:
    (token,) = chat_logprobs([7], [ENTRY], 2)["content"]  # type: ignore[misc]
    assert [entry["token"] for entry in token["top_logprobs"]] == ["a", "ä"]
    assert token["top_logprobs"][1]["bytes"] == [195, 164]
    (alone,) = chat_logprobs([7], [ENTRY], 0)["content"]  # type: ignore[misc]
    assert alone["top_logprobs"] == []


def test_a_completion_names_the_most_likely_tokens_and_the_chosen_one() -> None:
    builder = CompletionLogprobs(1)
    first = builder.add([5, 7], [None, ENTRY], "x")
    assert first["tokens"] == ["x", "c"]
    assert first["top_logprobs"] == [None, {"a": -0.1, "c": -9999.0}]
    assert builder.add([6], [ENTRY])["text_offset"] == [2]


def test_a_token_without_text_is_named_by_its_id() -> None:
    (token,) = chat_logprobs([5], [{5: Logprob(-1.0, 1)}], 1)["content"]  # type: ignore[misc]
    assert token["token"] == "token_id:5"
