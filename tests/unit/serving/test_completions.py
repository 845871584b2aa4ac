"""`/v1/completions`: several prompts, echo, log probabilities, scoring; the same streamed and at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.unit.serving.service import client_of, events

URL = "/v1/completions"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with client_of() as client:
        yield client


def texts_of(chunks: list[Any]) -> dict[int, str]:
    """The joined texts of a stream by index."""
    texts: defaultdict[int, str] = defaultdict(str)
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


@pytest.mark.parametrize("prompt", ["wa", ["wa", "ter"], [5, 6], [[5], [6, 7]]])
@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_and_an_answer_at_once_say_the_same(client: TestClient, prompt: Any, n: int) -> None:
    body = {"prompt": prompt, "n": n, "max_tokens": 4, "temperature": 1, "echo": isinstance(prompt, str)}
    choices = client.post(URL, json=body).json()["choices"]
    num_prompts = 2 if isinstance(prompt[0], list) or prompt == ["wa", "ter"] else 1
    assert [choice["index"] for choice in choices] == list(range(num_prompts * n))
    *chunks, done = events(client.post(URL, json={**body, "stream": True}))
    assert done == "[DONE]"
    assert texts_of(chunks) == {choice["index"]: choice["text"] for choice in choices}
    ends = [
        (choice["index"], choice["finish_reason"])
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["finish_reason"]
    ]
    assert sorted(ends) == [(index, "length") for index in range(num_prompts * n)]


def test_echo_puts_the_prompt_before_the_text_and_its_logprobs_before_the_others(client: TestClient) -> None:
    body = {"prompt": "water", "max_tokens": 2, "echo": True, "logprobs": 1}
    choice = client.post(URL, json=body).json()["choices"][0]
    assert choice["text"] == "waterwater"
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert "".join(logprobs["tokens"][1:]) == "waterwater"
    assert len({len(values) for values in logprobs.values()}) == 1


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_echo_of_token_ids_is_their_text(client: TestClient, is_streamed: bool) -> None:
    """Regression: prompts of ids were not echoed, so that offsets of log probabilities were beyond the text."""
    tokens = client.post("/tokenize", json={"prompt": "water falls"}).json()["tokens"]
    whole = client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    body = {"prompt": [tokens, tokens[:2]], "max_tokens": 2, "echo": True, "n": 2, "stream": is_streamed}
    response = client.post(URL, json=body)
    texts = texts_of(events(response)[:-1] if is_streamed else [response.json()])
    assert texts[0].startswith(whole)
    assert texts[1].startswith(whole)
    assert texts[2].startswith(client.post("/detokenize", json={"tokens": tokens[:2]}).json()["prompt"])
    if not is_streamed:
        choice = client.post(URL, json={**body, "logprobs": 0, "n": 1}).json()["choices"][0]
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


@pytest.mark.parametrize("options", [{"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}])
def test_a_streamed_score_counts_no_completion_tokens(client: TestClient, options: dict[str, bool]) -> None:
    """Regression: it counted the one token that is generated and not shown, unlike the answer at once."""
    body = {"prompt": "water", "max_tokens": 0, "echo": True, "stream": True, "stream_options": options}
    *chunks, _ = events(client.post(URL, json=body))
    assert {chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["usage"]} == {0}


def test_an_echo_without_new_tokens_scores_the_prompt(client: TestClient) -> None:
    body = {"prompt": "water", "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = client.post(URL, json=body).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("water", "length")
    assert "".join(choice["logprobs"]["tokens"][1:]) == "water"
    assert answer["usage"]["completion_tokens"] == 0


def test_logprobs_are_the_chosen_token_and_so_many_others(client: TestClient) -> None:
    for count in (0, 1):
        logprobs = client.post(URL, json={"prompt": "a", "logprobs": count, "max_tokens": 2}).json()["choices"][0][
            "logprobs"
        ]
        assert logprobs["tokens"] == ["w", "ater"]
        assert [list(top) for top in logprobs["top_logprobs"]] == [["w"], ["ater"]]
        assert logprobs["text_offset"] == [0, 1]
    *chunks, _ = events(client.post(URL, json={"prompt": "a", "logprobs": 0, "max_tokens": 2, "stream": True}))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [token for part in parts for token in part["tokens"]] == ["w", "ater"]
    assert [offset for part in parts for offset in part["text_offset"]] == [0, 1]


def test_best_of_returns_the_best(client: TestClient) -> None:
    body = {"prompt": "a", "best_of": 3, "n": 2, "max_tokens": 2, "temperature": 1}
    assert [choice["index"] for choice in client.post(URL, json=body).json()["choices"]] == [0, 1]


def test_token_ids_come_back_on_request(client: TestClient) -> None:
    answer = client.post(URL, json={"prompt": [5, 6], "max_tokens": 3, "return_token_ids": True}).json()
    assert answer["choices"][0]["prompt_token_ids"] == [5, 6]
    ids = answer["choices"][0]["token_ids"]
    assert len(ids) == 3
    body = {"prompt": [5, 6], "max_tokens": 3, "return_token_ids": True, "stream": True}
    *chunks, _ = events(client.post(URL, json=body))
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == ids
    assert [chunk["choices"][0].get("prompt_token_ids") for chunk in chunks] == [[5, 6], *[None] * (len(chunks) - 1)]
    assert [version for chunk in chunks for version in chunk["choices"][0]["weight_versions"]] == [0] * 3


@pytest.mark.parametrize("is_streamed", [False, True])
def test_tokens_are_named_by_their_ids_on_request(client: TestClient, is_streamed: bool) -> None:
    body = {"prompt": [5, 6], "max_tokens": 3, "logprobs": True, "stream": is_streamed}
    options = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    response = client.post(URL, json={**body, **options})
    chunks = events(response)[:-1] if is_streamed else [response.json()]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0].get("token_ids")]
    names = [name for choice in choices for name in choice["logprobs"]["tokens"]]
    assert names == [f"token_id:{token}" for choice in choices for token in choice["token_ids"]]
    assert len(names) == 3
    if not is_streamed:
        assert choices[0]["weight_versions"] == [0, 0, 0]


def test_usage_counts_all_prompts(client: TestClient) -> None:
    body = {"prompt": [[5], [6, 7]], "n": 2, "max_tokens": 3, "temperature": 1}
    usage = client.post(URL, json=body).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 12)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *_, last, _ = events(client.post(URL, json={**body, **options}))
    assert last["usage"] == usage | {"prompt_tokens_details": last["usage"]["prompt_tokens_details"]}


def test_the_default_length_is_sixteen(client: TestClient) -> None:
    assert client.post(URL, json={"prompt": "a"}).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("logprobs", [False, None])
def test_logprobs_may_be_declined_in_words(logprobs: bool | None) -> None:
    """`false` was compared with a number, which failed as an error of the server."""
    with client_of() as client:
        answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "logprobs": logprobs})
    assert answer.json()["choices"][0]["logprobs"] is None
