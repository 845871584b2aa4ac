"""Bodies that should not reach an engine: each is a 4xx in the API's own shape, at once, and the server serves on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.testclient import TestClient

from penstock.serving import ServingSettings
from penstock.serving.anthropic.request import MessagesRequest
from penstock.serving.body import read_body
from penstock.serving.chat_request import ChatRequest
from penstock.serving.completion_request import CompletionRequest
from penstock.serving.embeddings import EmbeddingRequest
from penstock.serving.errors import HttpError
from penstock.serving.responses.request import ResponsesRequest
from tests.unit.serving.service import CHAT, client_of

MESSAGES = CHAT["messages"]
ATTEMPTS = 5


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with client_of(ServingSettings(max_body_bytes=100_000, max_choices=16, max_logit_bias=100)) as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200  # what is slow the first time
        yield client


def refused(client: TestClient, path: str, body: bytes, status: int = 400) -> dict[str, Any]:
    """The error of a request that is refused quickly."""
    best_s = 1.0
    for _ in range(ATTEMPTS):  # a busy machine may stall any single one
        begin = perf_counter()
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        best_s = min(best_s, perf_counter() - begin)
        assert response.status_code == status, response.text
        if best_s < 0.5:
            break
    assert best_s < 0.5
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1}).status_code == 200
    return dict(error)


BODIES = {
    "no body": b"",
    "no JSON": b"hello",
    "no object": b"[1, 2]",
    "null": b"null",
    "no UTF-8": b'{"messages": "\xff\xfe"}',
    "NaN": b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
    "infinity": b'{"messages": [{"role": "user", "content": "hi"}], "temperature": 1e999}',
    "a lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "a huge integer": b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": ' + b"9" * 300 + b"}",
    "thousands of digits": b'{"messages": [{"role": "user", "content": "hi"}], "seed": ' + b"9" * 9000 + b"}",
    "deep nesting": b'{"messages": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "deep nesting inside a message": b'{"messages": [{"role": "user", "content": '
    + b'{"a":' * 9_000
    + b"1"
    + b"}" * 9_000,
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_request_is_a_400(client: TestClient, name: str) -> None:
    refused(client, "/v1/chat/completions", BODIES[name])


FIELDS: list[tuple[str, Any]] = [
    *[("messages", value) for value in ([], {}, "hi", [1], [{}], [{"role": 1, "content": "x"}], None)],
    *[("messages", [{"role": "tool", "content": "x", name: 5}]) for name in ("name", "tool_call_id")],
    *[("messages", [{"role": "assistant", name: ["x"]}]) for name in ("refusal", "reasoning", "reasoning_content")],
    *[
        ("messages", [{"role": "assistant", "tool_calls": [{name: 5, "function": {"name": "f", "arguments": "{}"}}]}])
        for name in ("id", "type")
    ],
    *[("messages", [{"role": "user", "content": value}]) for value in (1, {}, [1], [{"type": "text"}], [{"text": 1}])],
    *[("n", value) for value in (0, -1, 1.5, "2", True, [], 10**6, 2**31, 10**30)],
    *[("best_of", value) for value in (0, 17, "2")],
    *[("temperature", value) for value in (-0.1, "1", [], True)],
    *[("top_p", value) for value in (0, 1.1, -1)],
    *[("max_tokens", value) for value in (0, -1, "10", 1.5, 10**30)],
    *[("stop", value) for value in ("", ["", "a"], 5, [5], ["x"] * 17)],
    *[("logit_bias", value) for value in ({"foo": 1}, {"1": "x"}, {"-1": 1}, {"99999": 1}, [1])],
    ("logit_bias", {str(token): 1 for token in range(101)}),
    *[("logprobs", value) for value in (5, "yes")],
    ("top_logprobs", 3),  # without logprobs
    *[("min_tokens", value) for value in (-1, 10**9, 7)],  # 7: more than max_tokens
    *[("seed", value) for value in (2**70, 1.5, "x")],
    *[("stream", value) for value in ("yes", 1)],
    *[("stream_options", value) for value in (1, {"include_usage": "yes"})],
    *[("chat_template_kwargs", {name: True}) for name in ("chat_template", "tokenize", "messages", "return_tensors")],
    ("chat_template_kwargs", [1]),
    *[("priority", value) for value in (7, "now", 1.5)],
    *[("deadline", value) for value in (0, -1, "soon")],
    *[("model", value) for value in (1, [])],
    *[("stop_token_ids", value) for value in ([-1], ["a"], 5)],
    ("allowed_token_ids", []),
    ("functions", [{"name": "f"}]),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "alloy"}),
]


@pytest.mark.parametrize("stream", [False, True])
def test_values_of_the_wrong_kind_are_a_400_and_never_begin_a_stream(client: TestClient, stream: bool) -> None:
    for name, value in FIELDS:
        body = {**CHAT, "stream": stream, name: value}
        error = refused(client, "/v1/chat/completions", json.dumps(body).encode())
        assert error["type"] == "invalid_request_error", (name, value)


PROMPTS: list[dict[str, Any]] = [
    *[
        {"prompt": value}
        for value in ("", [], [[]], [""], ["a", ""], 5, {}, [1, "a"], [[1], "a"], [-1], [10**12], [1.5])
    ],
    *[{"prompt": value} for value in (["a"] * 17, [[1]] * 17, [99999], "x" * 60_000)],
    {"prompt": ["a"] * 5, "n": 4},
    {"prompt": ["a"] * 5, "best_of": 4},
    {"prompt": "a", "suffix": "b"},
    {"prompt": "a", "max_tokens": 0},
    {"prompt": "a", "logprobs": 100},
    {"prompt": "a", "best_of": 2, "stream": True},
    {"prompt": "a", "echo": True, "logprobs": 1, "stream": True},
    {},
]


def test_prompts_of_the_wrong_kind_or_number_are_a_400(client: TestClient) -> None:
    for body in PROMPTS:
        refused(client, "/v1/completions", json.dumps(body).encode())


def test_a_long_body_is_a_413_with_and_without_a_length(client: TestClient) -> None:
    body = json.dumps({"prompt": "x" * 200_000}).encode()
    assert refused(client, "/v1/completions", body, 413)["code"] == "body_too_large"
    response = client.post("/v1/completions", content=iter([body[:90_000], body[90_000:]]))
    assert response.status_code == 413
    response = client.post("/v1/completions", content=b"{}", headers={"content-length": "9" * 30})
    assert response.status_code == 413


def test_a_template_in_a_request_is_refused_in_every_api(client: TestClient) -> None:
    """Regression: it was ignored without a word."""
    for path, body in (
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5}),
        ("/v1/responses", {"input": "x"}),
        ("/tokenize", {"messages": MESSAGES}),
    ):
        response = client.post(path, json={**body, "chat_template": "{{ 7 * 7 }}"})
        assert response.status_code == 400
        assert "chat_template" in response.json()["error"]["message"]


def test_a_compressed_body_is_a_415_that_says_so(client: TestClient) -> None:
    """Regression: it was called JSON that is not valid."""
    response = client.post("/v1/completions", content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    assert response.status_code == 415
    assert "uncompressed" in response.json()["error"]["message"]


def test_an_image_for_a_text_model_is_a_400_that_says_so(client: TestClient) -> None:
    parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    body = {"messages": [{"role": "user", "content": parts}]}
    error = refused(client, "/v1/chat/completions", json.dumps(body).encode())
    assert "image_url" in error["message"]
    assert "text only" in error["message"]


def test_what_the_template_refuses_is_a_400_in_its_words(client: TestClient) -> None:
    body = {"messages": [{"role": "robot", "content": "hi"}]}
    assert "no robots" in refused(client, "/v1/chat/completions", json.dumps(body).encode())["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"model": None, **CHAT}),
        ("/v1/embeddings", {"input": "hi"}),
        ("/tokenize", {"prompt": "hi"}),
    ],
)
def test_null_is_the_default_of_every_field(client: TestClient, path: str, body: dict[str, Any]) -> None:
    """Clients that write all of their fields were refused for those of vLLM's that are flags."""
    document = client.get("/openapi.json").json()
    reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rpartition("/")[2]]
    nulls: dict[str, Any] = dict.fromkeys(set(schema["properties"]) - set(schema.get("required", ())))
    if "stream_options" in nulls:
        nulls["stream_options"] = {"include_usage": None, "continuous_usage_stats": None}
    response = client.post(path, json={**nulls, **body})
    assert response.status_code == 200, response.text


def test_unknown_fields_are_ignored(client: TestClient) -> None:
    assert client.post("/v1/chat/completions", json={**CHAT, "store": True, "made_up": {"a": 1}}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"])
def test_a_body_that_is_no_object_is_refused_in_plain_words(client: TestClient, path: str) -> None:
    """It said "Input should be a valid dictionary or instance of ChatRequest"."""
    for body in (b"null", b"[1, 2]", b"5", b'"hi"'):
        error = refused(client, path, body)
        assert error["message"].startswith("the body must be a JSON object, got ")


@pytest.mark.parametrize(("method", "path", "status"), [("POST", "/v1/nope", 404), ("GET", "/v1/completions", 405)])
def test_unknown_paths_and_methods_have_errors_of_the_same_shape(
    client: TestClient, method: str, path: str, status: int
) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("stop", "x" * 20_000), ("stop", [f"{number}" * 1_500 for number in range(16)]), ("bad_words", ["a"] * 2_000)],
)
def test_stop_strings_and_bad_words_that_would_delay_others_are_refused(
    client: TestClient, field: str, value: object
) -> None:
    """A megabyte of stop strings halted every stream for seconds."""
    error = refused(client, "/v1/chat/completions", json.dumps({**CHAT, field: value}).encode())
    assert (error["param"], "more than this server allows" in error["message"]) == (field, True)


async def test_a_body_that_does_not_arrive_is_a_408() -> None:
    """Clients that never finished their bodies occupied the server's open requests."""

    async def receive() -> dict[str, object]:
        if first:
            return {"type": "http.request", "body": first.pop(), "more_body": True}
        await asyncio.Event().wait()
        return {}

    first = [b'{"messages": ']
    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    with pytest.raises(HttpError, match=r"did not arrive within 0\.01 seconds") as caught:
        await read_body(request, 1_000, timeout_s=0.01)
    assert caught.value.status == 408


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {**CHAT, "stop": 5}, "stop"),
        ("/v1/chat/completions", {**CHAT, "stop": ["a", 5]}, "stop.1"),
        ("/v1/chat/completions", {**CHAT, "tool_choice": 5}, "tool_choice"),
        ("/v1/chat/completions", {**CHAT, "logit_bias": {"foo": 1}}, "logit_bias.foo"),
        ("/v1/chat/completions", {**CHAT, "priority": []}, "priority"),
        (
            "/v1/chat/completions",
            {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "response_format.json_schema.schema",
        ),
        ("/v1/completions", {"prompt": {}}, "prompt"),
        ("/v1/completions", {"prompt": [[1], [-1]]}, "prompt.1.0"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/embeddings", {"input": [[1], ["a"]]}, "input.1.0"),
        ("/v1/responses", {"input": [1]}, "input.0"),
    ],
)
def test_an_error_names_the_place_in_the_body_and_no_type_of_the_server(
    client: TestClient, path: str, body: dict[str, Any], param: str
) -> None:
    """`param` was "stop.list[str].1" and "prompt.list[list[constrained-int]].1.0", which no client sent."""
    error = refused(client, path, json.dumps(body).encode())
    assert error["param"] == param
    assert error["message"].startswith(param)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings", "/v1/completions", "/v1/chat/completions"])
def test_more_objects_and_lists_than_a_request_needs_are_refused(path: str) -> None:
    """A megabyte of short lists took seconds to build and to refuse one by one, and every stream waited."""
    with client_of(ServingSettings()) as client:
        for name in ("input", "prompt", "messages", "whatever"):
            body = json.dumps({name: [[1]] * 100_000}).encode()
            response = client.post(path, content=body)
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "body_too_complex"


def test_brackets_in_a_text_are_no_lists() -> None:
    with client_of(ServingSettings()) as client:
        text = '[{"' * 30_000
        response = client.post("/tokenize", json={"prompt": text})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("model", "field", "value"),
    [
        (EmbeddingRequest, "input", [None] * 20_000),
        (EmbeddingRequest, "input", [[None]] * 20_000),
        (ResponsesRequest, "input", [1] * 20_000),
        (ResponsesRequest, "include", [1] * 20_000),
        (CompletionRequest, "prompt", [None] * 20_000),
        (MessagesRequest, "messages", [1] * 20_000),
        (MessagesRequest, "system", [1] * 20_000),
        (ChatRequest, "stop", [1] * 20_000),
    ],
)
def test_one_fault_of_a_long_list_is_enough(model: type[BaseModel], field: str, value: object) -> None:
    """A description of each of 600,000 faults took five seconds, during which every stream stood still."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate({"messages": MESSAGES, field: value})
    assert caught.value.error_count() < 10


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids"])
def test_more_token_ids_than_steer_anything_are_refused(client: TestClient, field: str) -> None:
    """400,000 of them were looked at one by one on the loop of all streams."""
    error = refused(client, "/v1/chat/completions", json.dumps({**CHAT, field: [5] * 20_000}).encode())
    assert (error["param"], "20000 token ids are more than 16384" in error["message"]) == (field, True)
