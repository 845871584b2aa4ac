"""`/v1/chat/completions`: the same answer streamed and at once, finish reasons, usage, log probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.unit.serving.service import CHAT, client_of, events


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with client_of() as client:
        yield client


def test_a_stream_and_an_answer_at_once_say_the_same(client: TestClient) -> None:
    whole = client.post("/v1/chat/completions", json=CHAT).json()
    *chunks, done = events(client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert whole["choices"][0]["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_every_choice_of_a_stream_has_exactly_one_finish_reason(client: TestClient) -> None:
    body = {**CHAT, "n": 3, "stream": True, "stop": "falls"}
    chunks = events(client.post("/v1/chat/completions", json=body))[:-1]
    reasons = [(choice["index"], choice["finish_reason"]) for chunk in chunks for choice in chunk["choices"]]
    ends = [reason for reason in reasons if reason[1] is not None]
    assert sorted(ends) == [(0, "stop"), (1, "stop"), (2, "stop")]


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0, 1])
def test_n_choices_come_back(client: TestClient, n: int, temperature: float) -> None:
    choices = client.post("/v1/chat/completions", json={**CHAT, "n": n, "temperature": temperature}).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(n))


def test_usage_of_a_stream_comes_only_when_it_is_asked_for(client: TestClient) -> None:
    for options in (None, {}, {"include_usage": False}):
        chunks = events(client.post("/v1/chat/completions", json={**CHAT, "stream": True, "stream_options": options}))
        assert not any("usage" in chunk for chunk in chunks[:-1])
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, _ = events(client.post("/v1/chat/completions", json=body))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert last["usage"]["total_tokens"] == 6 + last["usage"]["prompt_tokens"]


def test_continuous_usage_counts_up(client: TestClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(client.post("/v1/chat/completions", json={**CHAT, "stream": True, "stream_options": options}))[:-1]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 6)


def test_logprobs_of_zero_are_those_of_the_chosen_tokens_alone(client: TestClient) -> None:
    body = {**CHAT, "logprobs": True, "top_logprobs": 0}
    content = client.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 6
    assert all(entry["top_logprobs"] == [] and entry["logprob"] == 0 for entry in content)
    *chunks, _ = events(client.post("/v1/chat/completions", json={**body, "stream": True}))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in parts if part for entry in part["content"]] == content


def test_max_tokens_are_cut_to_what_fits(client: TestClient) -> None:
    """It was an error, or an empty answer."""
    limit = 512
    for max_tokens in (limit, 10 * limit, None):
        answer = client.post("/v1/chat/completions", json={**CHAT, "max_tokens": max_tokens}).json()
        assert answer["usage"]["total_tokens"] == limit
        assert answer["choices"][0]["finish_reason"] == "length"


def test_a_prompt_that_is_too_long_is_a_400_before_the_stream(client: TestClient) -> None:
    messages = [{"role": "user", "content": "water " * 1000}]
    for stream in (False, True):
        response = client.post("/v1/chat/completions", json={"messages": messages, "stream": stream})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["type"] == "invalid_request_error"
        assert "512" in error["message"]


def test_an_unknown_model_is_a_404(client: TestClient) -> None:
    response = client.post("/v1/chat/completions", json={**CHAT, "model": "gpt-9"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def text_of_prompt(client: TestClient, messages: list[dict[str, object]], **more: object) -> str:
    """The rendered chat."""
    ids = client.post("/tokenize", json={"messages": messages, **more}).json()["tokens"]
    return str(client.post("/detokenize", json={"tokens": ids}).json()["prompt"])


def test_an_assistants_last_message_is_continued_and_not_echoed(client: TestClient) -> None:
    messages: list[dict[str, object]] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "wat"}]
    assert text_of_prompt(client, messages).endswith("<|assistant|>wat")
    assert text_of_prompt(client, messages, add_generation_prompt=True).endswith("wat<end><|assistant|>")
    answer = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2}).json()
    assert answer["choices"][0]["message"]["content"] == "water"  # the script's, without "wat" before it


def test_an_empty_assistant_message_is_accepted(client: TestClient) -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": ""}, *CHAT["messages"]]  # type: ignore[misc]
    assert client.post("/v1/chat/completions", json={**CHAT, "messages": messages}).status_code == 200


@pytest.mark.parametrize("role", ["system", "developer", "user", "tool", "assistant"])
def test_a_message_without_content_is_refused(client: TestClient, role: str) -> None:
    """It counted as empty, and the model answered to nothing."""
    for content in ({}, {"content": None}, {"content": []}, {"tool_calls": [], "content": None}):
        messages = [*CHAT["messages"], {"role": role, **content}, *CHAT["messages"]]  # type: ignore[misc]
        response = client.post("/v1/chat/completions", json={**CHAT, "messages": messages})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["type"]) == ("messages.1.content", "invalid_request_error")
        assert "needs content" in error["message"]


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
WRITTEN = '{"name": "f", "arguments": {}}'  # the template of these tests renders no calls


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, WRITTEN),
        ({"role": "assistant", "content": [], "tool_calls": [CALL]}, WRITTEN),
        ({"role": "assistant", "function_call": CALL["function"]}, ""),
        ({"role": "assistant", "content": None, "reasoning_content": "so"}, ""),
        ({"role": "assistant", "content": None, "refusal": "I will not."}, "I will not."),
        ({"role": "function", "name": "f", "content": None}, ""),
    ],
)
def test_content_may_be_null_where_something_is_in_its_place(
    client: TestClient, message: dict[str, Any], text: str
) -> None:
    rendered = text_of_prompt(client, [*CHAT["messages"], message, {"role": "user", "content": "and?"}])  # type: ignore[misc]
    assert f"<|{message['role']}|>{text}<end>" in rendered


def test_an_empty_list_of_calls_is_none(client: TestClient) -> None:
    """The message counted as one with calls, so that the model began another one instead of continuing it."""
    last = {"role": "assistant", "content": "wat", "tool_calls": []}
    assert text_of_prompt(client, [*CHAT["messages"], last]).endswith("<|assistant|>wat")  # type: ignore[misc]


def test_a_developers_message_is_the_systems(client: TestClient) -> None:
    """Most templates know no developer: they ignore what it says, or refuse it."""
    assert text_of_prompt(client, [{"role": "developer", "content": "be brief"}]).startswith("<s><|system|>be brief")


def test_text_parts_are_joined(client: TestClient) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "a\nb" in text_of_prompt(client, [{"role": "user", "content": parts}])


def test_a_chats_token_ids_come_back_on_request(client: TestClient) -> None:
    options = {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": True}
    answer = client.post("/v1/chat/completions", json={**CHAT, **options}).json()
    (choice,) = answer["choices"]
    names = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert names == [f"token_id:{token}" for token in choice["token_ids"]]
    assert choice["weight_versions"] == [0] * len(names)
    for stream_options in ({}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}):
        body = {**CHAT, "return_token_ids": True, "stream": True, "stream_options": stream_options}
        first, *chunks, _ = events(client.post("/v1/chat/completions", json=body))
        assert first["prompt_token_ids"] == answer["prompt_token_ids"]
        assert ("usage" in first) == bool(stream_options)
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        ids = [token for choice in choices for token in choice.get("token_ids", ())]
        assert ids == answer["choices"][0]["token_ids"]
        assert [version for choice in choices for version in choice.get("weight_versions", ())] == [0] * 6


def test_stop_strings_end_a_chat_and_are_named(client: TestClient) -> None:
    choice = client.post("/v1/chat/completions", json={**CHAT, "stop": ["zz", " fa"]}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("water", "stop", " fa")
