"""`/v1/messages`: events of a stream and the message at once, conversations, errors in Anthropic's shape, models."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.types import Message, ModelInfo, RawMessageStreamEvent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from penstock.errors import DeadlineExceeded, EngineOverloaded, RequestTooLarge
from penstock.serving import ServingSettings
from penstock.serving.settings import ApiKey
from tests.unit.serving.service import client_of
from tests.unit.serving.split_engine import SplitEngine, cut, named_events, split_client
from tests.unit.serving.test_responses import CALL, TEXTS

TOOLS = [{"name": "add", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}]
BODY = {"max_tokens": 100, "messages": [{"role": "user", "content": "what falls?"}]}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def create(client: TestClient, **body: Any) -> dict[str, Any]:
    """A message that must succeed, valid by the SDK's own types."""
    answer = client.post("/v1/messages", json={**BODY, **body})
    assert answer.status_code == 200, answer.text
    value: dict[str, Any] = answer.json()
    Message.model_validate(value)
    return value


def stream(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream but for pings, each valid by the SDK's own types."""
    events = named_events(client.post("/v1/messages", json={**BODY, "stream": True, **body}))
    events = [event for event in events if event["type"] != "ping"]
    for event in events:
        if event["type"] != "error":
            EVENT.validate_python(event)
    return events


def rebuilt(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message as a client builds it from the events; every block begins once, grows and ends once."""
    message: dict[str, Any] = {}
    is_open, texts = False, list[str]()
    for event in events:
        kind = event["type"]
        if kind == "message_start":
            assert not message
            message = event["message"]
            continue
        block = message["content"][-1] if message["content"] else {}
        if kind == "content_block_start":
            assert not is_open
            is_open, texts = True, []
            message["content"].append(event["content_block"])
        elif kind == "content_block_delta":
            assert is_open
            values = {name: value for name, value in event["delta"].items() if name != "type"}
            ((name, value),) = values.items()
            if name == "partial_json":
                texts.append(value)
            else:
                block[name] += value
        elif kind == "content_block_stop":
            is_open = False
            if block["type"] == "tool_use" and _is_json("".join(texts)):
                block["input"] = json.loads("".join(texts))
        elif kind == "message_delta":
            message.update(event["delta"])
            message["usage"].update(event["usage"])
        if "index" in event:
            assert event["index"] == len(message["content"]) - 1
    assert not is_open
    assert events[-1]["type"] == "message_stop"
    return message


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what differs from one request to the next."""
    blocks = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return {**message, "id": None, "content": blocks}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([text for text in TEXTS if not text.endswith(": ")]),
    st.lists(st.integers(1, 80)),
    st.sampled_from([("stop", None), ("stop", "END"), ("length", None)]),
    st.sampled_from([None, {"type": "enabled", "budget_tokens": 9, "display": "omitted"}, {"type": "disabled"}]),
)
def test_a_stream_and_a_message_at_once_agree_for_every_split(
    client: TestClient, engine: SplitEngine, text: str, places: list[int], end: tuple[str, str | None], thinking: Any
) -> None:
    engine.chunks, (engine.finish_reason, engine.stop_reason) = cut(text, places), end
    body = {"tools": TOOLS, "thinking": thinking}
    assert without_ids(rebuilt(stream(client, **body))) == without_ids(create(client, **body))


def test_the_events_of_a_text_come_in_their_order(client: TestClient, engine: SplitEngine) -> None:
    events = named_events(client.post("/v1/messages", json={**BODY, "stream": True}))
    assert [event["type"] for event in events] == [
        *("message_start", "ping", "content_block_start", "content_block_delta", "content_block_delta"),
        *("content_block_stop", "message_delta", "message_stop"),
    ]


def test_a_stream_begins_with_the_number_of_input_tokens(client: TestClient, engine: SplitEngine) -> None:
    """It was 0 in other servers."""
    first, *_, last, _ = stream(client)
    assert first["message"]["usage"]["input_tokens"] == 5
    assert last["usage"] == create(client)["usage"]
    assert (last["usage"]["input_tokens"], last["usage"]["cache_read_input_tokens"]) == (3, 2)
    assert last["usage"]["output_tokens"] == 11


def test_thinking_is_a_block_of_its_own(client: TestClient, engine: SplitEngine) -> None:
    engine.chunks = [f"<think>hm</think>It is {CALL}"]
    thinking, text, call = create(client, tools=TOOLS)["content"]
    assert thinking["thinking"] == "hm"
    assert thinking["signature"]
    assert text["text"].strip() == "It is"
    assert (call["name"], call["input"]) == ("add", {"a": 1})


def test_thinking_is_left_out_where_it_is_disabled(client: TestClient, engine: SplitEngine) -> None:
    engine.chunks = ["<think>hm</think>yes"]
    message = create(client, thinking={"type": "disabled"})
    assert [block["type"] for block in message["content"]] == ["text"]
    assert engine.prompts[-1]["chat_template_kwargs"] == {"enable_thinking": False}
    omitted = create(client, thinking={"type": "adaptive", "display": "omitted"})["content"][0]
    assert (omitted["type"], omitted["thinking"], bool(omitted["signature"])) == ("thinking", "", True)
    assert engine.prompts[-1]["chat_template_kwargs"] == {"enable_thinking": True}


@pytest.mark.parametrize(
    ("text", "end", "reason", "stop"),
    [
        ("yes", ("stop", None), "end_turn", None),
        ("yes", ("stop", "END"), "stop_sequence", "END"),
        ("yes", ("stop", 7), "end_turn", None),
        (CALL, ("stop", None), "tool_use", None),
        (CALL, ("stop", "END"), "tool_use", None),
        (CALL[:-20], ("stop", "END"), "stop_sequence", "END"),
        ("x" * 100, ("length", None), "max_tokens", None),
        ("yes", ("length", None), "model_context_window_exceeded", None),
    ],
)
def test_the_stop_reason_says_why_the_message_ended(
    client: TestClient, engine: SplitEngine, text: str, end: tuple[str, Any], reason: str, stop: str | None
) -> None:
    engine.chunks, (engine.finish_reason, engine.stop_reason) = [text], end
    for message in (create(client, tools=TOOLS), rebuilt(stream(client, tools=TOOLS))):
        assert (message["stop_reason"], message["stop_sequence"]) == (reason, stop)


def test_the_arguments_of_a_call_that_was_cut_off_are_those_that_are_there(
    client: TestClient, engine: SplitEngine
) -> None:
    engine.chunks, engine.finish_reason = ['<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": '], "length"
    assert create(client, tools=TOOLS)["content"][0]["input"] == {"a": 1}


def test_stop_sequences_sleep_through_the_reasoning(client: TestClient, engine: SplitEngine) -> None:
    create(client, stop_sequences=["END"])
    assert (engine.params[-1].stop, engine.params[-1].reasoning_end) == (("END",), "</think>")


def test_a_conversation_is_read_from_blocks(client: TestClient, engine: SplitEngine) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "add"}, {"type": "text", "text": "1"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "2"}]},
                {"type": "text", "text": "well?"},
            ],
        },
        {"role": "user", "content": "hurry"},
    ]
    create(client, system=[{"type": "text", "text": "be kind"}], messages=messages, tools=TOOLS)
    system, user, call, tool, last = engine.prompts[-1]["messages"]
    assert system == {"role": "system", "content": "be kind"}
    assert user["content"] == "add\n1"
    assert (call["content"], call["reasoning_content"]) == ("Let me see.", "hm")
    assert call["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert tool == {"role": "tool", "tool_call_id": "c1", "content": "2"}
    assert last["content"] == "well?\nhurry"
    assert engine.prompts[-1]["tools"][0]["function"]["name"] == "add"


def test_a_last_message_of_the_assistant_is_continued(client: TestClient, engine: SplitEngine) -> None:
    messages = [*BODY["messages"], {"role": "assistant", "content": "The "}]  # type: ignore[misc]
    assert create(client, messages=messages)["content"][0]["text"] == "water falls"
    assert engine.prompts[-1]["messages"][-1] == {"role": "assistant", "content": "The "}
    create(client, messages=[*BODY["messages"], {"role": "assistant", "content": ""}])  # type: ignore[misc]
    assert engine.prompts[-1]["messages"][-1]["role"] == "user"


def test_a_template_without_tools_gets_instructions() -> None:
    with split_client(SplitEngine("{{ messages }}")) as (client, engine):
        engine.chunks = ['{"name": "add", "arguments": {"a": 1}}']
        message = create(client, tools=TOOLS, system="be kind")
        assert message["content"][0]["input"] == {"a": 1}
        system = engine.prompts[-1]["messages"][0]["content"]
        assert system.startswith("be kind\n\n")
        assert '"add"' in system
        assert "tools" not in engine.prompts[-1]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "text only"),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages.0 needs content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0 needs content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "JSON"),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "y", "input": 3}]}
                ]
            },
            "input",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]}, "tool_use_id"),
        ({"system": [{"type": "image"}]}, "system"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tool_choice": {"type": "any"}}, "no tools"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": TOOLS}, "x"),
        ({"stop_sequences": ["x"] * 17}, "stop"),
        ({"n": 2}, "n"),
        ({"stop": "x"}, "stop_sequences"),
        ({"temperature": -1}, "temperature"),
        ({"thinking": {"type": "maybe"}}, "thinking"),
    ],
)
def test_what_is_invalid_is_refused_in_the_apis_own_shape(
    client: TestClient, engine: SplitEngine, body: dict[str, Any], words: str
) -> None:
    for is_streamed in (False, True):
        content = json.dumps({**BODY, "stream": is_streamed, **body}).encode()
        answer = client.post("/v1/messages", content=content)
        assert answer.status_code == 400
        value = answer.json()
        assert set(value) == {"type", "error"}
        assert (value["type"], value["error"]["type"]) == ("error", "invalid_request_error")
        assert words in value["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (EngineOverloaded("the queue is full", 3.0), 429, "overloaded_error"),
        (RequestTooLarge("too long"), 400, "invalid_request_error"),
        (DeadlineExceeded("too late"), 408, "timeout_error"),
        (RuntimeError("secret"), 500, "api_error"),
    ],
)
def test_errors_of_the_engine_have_the_apis_own_types(
    client: TestClient, engine: SplitEngine, error: Exception, status: int, kind: str
) -> None:
    engine.error = error
    answer = client.post("/v1/messages", json=BODY)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
    assert "secret" not in answer.text
    last = stream(client)[-1]
    assert (last["type"], last["error"]["type"]) == ("error", kind)


def test_refusals_before_the_endpoint_have_the_apis_own_shape() -> None:
    keys = (ApiKey(name="a", key="aaaaaaaa", requests_per_minute=1),)  # type: ignore[arg-type]
    with split_client(settings=ServingSettings(api_keys=keys, max_body_bytes=200)) as (client, engine):
        engine.chunks = ["yes"]
        header = {"x-api-key": "aaaaaaaa"}

        def kind(status: int, method: str = "POST", path: str = "/v1/messages", **options: Any) -> str:
            answer = client.request(method, path, **options)
            assert answer.status_code == status
            assert answer.json()["type"] == "error"
            return str(answer.json()["error"]["type"])

        assert kind(401, json=BODY) == "authentication_error"
        assert kind(413, content=b"x" * 201, headers=header) == "request_too_large"
        assert kind(429, json=BODY, headers=header) == "rate_limit_error"
        assert kind(405, method="GET", headers=header) == "invalid_request_error"
        assert kind(404, method="GET", path="/v1/messages/nothing", headers=header) == "not_found_error"
        version = {"anthropic-version": "2023-06-01"}
        assert kind(404, method="GET", path="/v1/models/nothing", headers=header | version) == "not_found_error"


def test_tool_results_count_as_messages() -> None:
    results = [{"type": "tool_result", "tool_use_id": "c", "content": "x"}, {"type": "text", "text": "x"}] * 3
    with split_client(settings=ServingSettings(max_messages=5)) as (client, _):
        answer = client.post("/v1/messages", json={**BODY, "messages": [{"role": "user", "content": results}]})
        assert answer.status_code == 400
        assert "6 messages" in answer.json()["error"]["message"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_schema_that_cannot_be_enforced_is_refused_by_its_keyword(is_streamed: bool) -> None:
    """Other servers ignored such keywords. Streams are refused before they begin."""
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    with client_of() as client:
        body = {**BODY, "stream": is_streamed, "output_config": {"format": {"type": "json_schema", "schema": schema}}}
        refusals = [
            client.post("/v1/messages", json=body),
            client.post("/v1/responses", json={"input": "x", "stream": is_streamed, "text": text}),
        ]
        for answer in refusals:
            assert answer.status_code == 400
            assert "not" in answer.json()["error"]["message"].replace("cannot", "")
        assert refusals[1].json()["error"]["code"] == "invalid_grammar"


def test_a_prompt_that_is_too_long_is_refused_before_the_stream() -> None:
    long = "water " * 1000
    with client_of() as client:
        for path, body in (
            ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": long}]}),
            ("/v1/responses", {"input": long}),
        ):
            answer = client.post(path, json={**body, "stream": True})
            assert answer.status_code == 400
            assert "512" in answer.json()["error"]["message"]


def test_a_model_that_is_not_served_is_a_404(client: TestClient, engine: SplitEngine) -> None:
    answer = client.post("/v1/messages", json={**BODY, "model": "unknown"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_tokens_are_counted_without_generating(client: TestClient, engine: SplitEngine) -> None:
    num_requests = len(engine.prompts)
    body = {"messages": BODY["messages"], "system": "be kind"}
    answer = client.post("/v1/messages/count_tokens", json=body)
    assert answer.json()["input_tokens"] > 10
    assert len(engine.prompts) == num_requests


def test_models_have_anthropics_shape_for_its_clients() -> None:
    version = {"anthropic-version": "2023-06-01"}
    with split_client(settings=ServingSettings(served_model_name=("a", "b/c", "d"))) as (client, _):
        page = client.get("/v1/models", headers=version, params={"limit": 2}).json()
        assert [model["id"] for model in page["data"]] == ["a", "b/c"]
        assert (page["first_id"], page["last_id"], page["has_more"]) == ("a", "b/c", True)
        for model in page["data"]:
            ModelInfo.model_validate(model)
        after = client.get("/v1/models", headers=version, params={"after_id": "b/c"}).json()
        assert ([model["id"] for model in after["data"]], after["has_more"]) == (["d"], False)
        before = client.get("/v1/models", headers=version, params={"before_id": "d", "limit": 1}).json()
        assert ([model["id"] for model in before["data"]], before["has_more"]) == (["b/c"], True)
        assert client.get("/v1/models/b/c", headers=version).json()["id"] == "b/c"
        assert client.get("/v1/models", headers=version, params={"after_id": "x"}).status_code == 400
        assert client.get("/v1/models").json()["object"] == "list"
