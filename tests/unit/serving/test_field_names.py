"""`param` of errors that the engine raises: the field of the request, under the name that its API has for it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from penstock import GenerationConfig, RequestError, SamplingParams, StructuredOutputs
from penstock.serving import ServingSettings
from tests.unit.serving.service import CHAT, client_of

LONG = "word " * 5000
FUNCTION = {"name": "look", "parameters": {"type": "object", "properties": {"q": {"type": "string", "format": "no"}}}}
TOOL = {"type": "function", "function": FUNCTION}
NAMED = {"name": "x", "schema": {"type": "nothing"}}
SCHEMA = {"type": "json_schema", "json_schema": NAMED}
INFER = {"token_ids": [5, 6]}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with client_of(ServingSettings(max_body_bytes=1_000_000)) as client:
        yield client


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": LONG}]}, "messages"),
    ("/v1/chat/completions", {**CHAT, "n": 3, "best_of": 2}, "best_of"),
    ("/v1/chat/completions", {**CHAT, "min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    ("/v1/chat/completions", {**CHAT, "stop": ["a", ""]}, "stop"),
    ("/v1/chat/completions", {**CHAT, "logit_bias": {"999999": 1}}, "logit_bias"),
    ("/v1/chat/completions", {**CHAT, "allowed_token_ids": []}, "allowed_token_ids"),
    ("/v1/chat/completions", {**CHAT, "bad_words": [""]}, "bad_words"),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 1000}, "top_logprobs"),
    ("/v1/chat/completions", {**CHAT, "response_format": SCHEMA}, "response_format"),
    ("/v1/chat/completions", {**CHAT, "structured_outputs": {"regex": "("}}, "structured_outputs"),
    ("/v1/chat/completions", {**CHAT, "structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ("/v1/chat/completions", {**CHAT, "tools": [TOOL, TOOL]}, "tools"),
    ("/v1/chat/completions", {**CHAT, "tools": [TOOL], "tool_choice": "none such"}, "tool_choice"),
    ("/v1/completions", {"prompt": LONG}, "prompt"),
    ("/v1/completions", {"prompt": [5, 999_999]}, "prompt"),
    ("/v1/completions", {"prompt": "a", "logprobs": 1000}, "logprobs"),
    ("/v1/completions", {"prompt": "a", "min_tokens": 20}, "min_tokens"),
    ("/v1/responses", {"input": LONG}, "input"),
    (
        "/v1/responses",
        {"input": "a", "text": {"format": {**NAMED, "type": "json_schema"}}},
        "text.format",
    ),
    ("/v1/responses", {"input": "a", "min_tokens": 9, "max_output_tokens": 3}, "min_tokens"),
    ("/v1/embeddings", {"input": LONG}, "input"),
    ("/inference/v1/generate", {**INFER, "sampling_params": {"n": 2, "best_of": 1}}, "sampling_params.best_of"),
    ("/inference/v1/generate", {"token_ids": [999_999]}, "token_ids"),
    (
        "/inference/v1/generate",
        {**INFER, "sampling_params": {"structured_outputs": {"regex": "("}}},
        "sampling_params.structured_outputs",
    ),
]


@pytest.mark.parametrize(("path", "body", "param"), CASES)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_names_the_field(
    client: TestClient, path: str, body: dict[str, Any], param: str, stream: bool
) -> None:
    """`param` was null unless the server itself had refused the request."""
    response = client.post(path, json={**body, "stream": stream})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error


def test_a_score_of_the_prompt_is_asked_for_by_logprobs(client: TestClient) -> None:
    body = {"prompt": "a", "echo": True, "max_tokens": 0, "logprobs": 1000}
    assert client.post("/v1/completions", json=body).json()["error"]["param"] == "logprobs"


def test_fields_are_named_where_the_app_is_mounted(client: TestClient) -> None:
    outer = FastAPI()
    outer.mount("/ai", client.app)
    body = {**CHAT, "messages": [{"role": "user", "content": LONG}]}
    response = TestClient(outer).post("/ai/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


def test_errors_in_anthropics_shape_have_no_such_field(client: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 5}
    assert client.post("/v1/messages", json=body).json()["error"].keys() == {"type", "message"}


@pytest.mark.parametrize(
    ("build", "parameter"),
    [
        (lambda: SamplingParams(temperature=-1), "temperature"),
        (lambda: SamplingParams(stop_token_ids=[-1]), "stop_token_ids"),
        (lambda: SamplingParams(logit_bias={-1: 0.0}), "logit_bias"),
        (lambda: GenerationConfig(num_beams=2, do_sample=True), "num_beams"),
        (lambda: StructuredOutputs(json="{"), "json"),
        (lambda: StructuredOutputs(), "structured_outputs"),
    ],
)
def test_an_error_has_the_name_of_the_parameter(build: Callable[[], object], parameter: str) -> None:
    with pytest.raises(RequestError) as caught:
        build()
    assert caught.value.parameter == parameter
    assert pickle.loads(pickle.dumps(caught.value)).parameter == parameter
