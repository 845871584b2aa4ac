"""Token ids over HTTP: tokenize, detokenize, generate from ids."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from penstock.serving import app
from tests.http_sockets import wait_until
from tests.unit.serving.service import CHAT, client_of, events
from tests.unit.testing.echo import EchoEngine


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with client_of() as client:
        yield client


def test_tokenize_gives_the_ids_of_the_request_that_would_run(client: TestClient) -> None:
    answer = client.post("/tokenize", json={"messages": CHAT["messages"]}).json()
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 512
    ids = client.post("/v1/chat/completions", json={**CHAT, "return_token_ids": True}).json()["prompt_token_ids"]
    assert answer["tokens"] == ids
    with_bos = client.post("/tokenize", json={"prompt": "water"}).json()["tokens"]
    assert (
        client.post("/tokenize", json={"prompt": "water", "add_special_tokens": False}).json()["tokens"] == with_bos[1:]
    )
    assert client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []


def test_detokenize_turns_it_round(client: TestClient) -> None:
    ids = client.post("/tokenize", json={"prompt": "wäter falls", "add_special_tokens": False}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "wäter falls"}


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": CHAT["messages"]}, {"prompt": 1}])
def test_tokenize_needs_one_text(client: TestClient, body: dict[str, object]) -> None:
    assert client.post("/tokenize", json=body).status_code == 400


def test_ids_in_ids_out_with_logprobs(client: TestClient) -> None:
    params = {"max_tokens": 3, "logprobs": 0, "prompt_logprobs": 0, "temperature": 0}
    answer = client.post("/inference/v1/generate", json={"token_ids": [5, 6], "sampling_params": params}).json()
    choice = answer["choices"][0]
    assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == 3
    assert choice["finish_reason"] == "length"
    first, second = answer["prompt_logprobs"]
    assert first is None
    assert second["6"]["logprob"] == 0
    body = {"token_ids": [5, 6], "sampling_params": params, "stream": True}
    refusal = client.post("/inference/v1/generate", json=body)
    assert (refusal.status_code, "prompt_logprobs" in refusal.text) == (400, True)
    del params["prompt_logprobs"]
    *chunks, done = events(client.post("/inference/v1/generate", json=body))
    assert done == "[DONE]"
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == choice["token_ids"]


def test_a_stream_of_ids_ends_with_a_reason_or_with_an_error_and_never_with_both() -> None:
    """Regression: a request that passed its deadline had a finish reason of its own before the error."""
    with client_of(step_s=0.05) as client:
        params: dict[str, object] = {"max_tokens": 200, "deadline": 0.5}
        body = {"token_ids": [5, 6], "sampling_params": params, "stream": True}

        def is_late() -> bool:
            response = client.post("/inference/v1/generate", json=body)
            if response.status_code == 408:  # before its stream began
                return False
            *chunks, last = events(response)
            assert last["error"]["code"] == "deadline_exceeded"
            assert {chunk["choices"][0]["finish_reason"] for chunk in chunks} <= {None}
            return bool(chunks)

        wait_until(is_late)
        params |= {"max_tokens": 2, "deadline": None}
        *_, last, _ = events(client.post("/inference/v1/generate", json=body))
        assert (last["choices"][0]["finish_reason"], last["choices"][0]["stop_reason"]) == ("length", None)


@pytest.mark.parametrize("ids", [[], [-1], [10**9], ["a"], "text"])
def test_ids_that_are_none_are_a_400(client: TestClient, ids: object) -> None:
    assert client.post("/inference/v1/generate", json={"token_ids": ids}).status_code == 400


def test_another_engine_answers_too_and_says_what_it_cannot_do() -> None:
    engine = EchoEngine()
    with TestClient(app(engine)) as client:
        body = {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 2}}
        assert client.post("/inference/v1/generate", json=body).json()["choices"][0]["token_ids"] == [5, 6]
        *chunks, _ = events(client.post("/v1/completions", json={"prompt": [5, 6, 7], "stream": True}))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " 5 6 7"
        assert client.post("/tokenize", json={"prompt": "a"}).status_code == 501
        assert client.get("/v1/models").json()["data"][0]["id"] == "penstock"
        assert client.get("/ready").status_code == 200
        assert b"vllm:request_success_total" in client.get("/metrics").content
    engine.stop(0)
