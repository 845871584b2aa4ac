"""`/v1/responses`: the events of a stream and the answer at once, kept responses, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from penstock.errors import DeadlineExceeded, RequestAborted
from penstock.serving import ServingSettings
from penstock.serving.settings import ApiKey
from tests.unit.serving.service import client_of
from tests.unit.serving.split_engine import SplitEngine, cut, named_events, split_client

TOOLS = [
    {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TEXTS = (
    "water falls",
    "",
    "<think>hm, so</think>water falls",
    f"<think>hm</think>It is {CALL}",
    f"{CALL}\n{CALL}",
    "a < b <tool_call> c",
    "<think>never ends",
    '<tool_call>\n{"name": "add", "arguments": {"a": ',
)
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def create(client: TestClient, **body: Any) -> dict[str, Any]:
    """A response that must succeed, valid by the SDK's own types."""
    answer = client.post("/v1/responses", json={"input": "what falls?", **body})
    assert answer.status_code == 200, answer.text
    value: dict[str, Any] = answer.json()
    Response.model_validate(value)
    return value


def stream(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, each valid by the SDK's own types, numbered from 0."""
    events = named_events(client.post("/v1/responses", json={"input": "what falls?", "stream": True, **body}))
    for event in events:
        EVENT.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def refused(client: TestClient, **body: Any) -> dict[str, Any]:
    """The error of a request that must be refused with a 400, streamed or not."""
    errors = []
    for is_streamed in (False, True):
        answer = client.post("/v1/responses", json={"input": "what falls?", "stream": is_streamed, **body})
        assert answer.status_code == 400, answer.text
        errors.append(answer.json()["error"])
    assert errors[0] == errors[1]
    value: dict[str, Any] = errors[0]
    return value


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """A response without what differs from one request to the next."""
    output = [
        {key: value for key, value in item.items() if key not in ("id", "call_id")} for item in response["output"]
    ]
    return {**response, "output": output} | dict.fromkeys(("id", "created_at", "completed_at"))


def rebuilt(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output as a client builds it from the deltas alone."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
        elif kind == "response.content_part.added":
            assert event["item_id"] == items[-1]["id"]
            items[-1]["content"].append(event["part"])
        elif kind.endswith("arguments.delta"):
            items[-1]["arguments"] += event["delta"]
        elif kind.endswith(".delta"):
            items[-1]["content"][0]["text"] += event["delta"]
            items[-1]["content"][0].get("logprobs", []).extend(event.get("logprobs", ()))
        elif kind == "response.output_item.done":
            items[-1]["status"] = event["item"]["status"]
            assert items[-1] == event["item"]
    return items


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(TEXTS), st.lists(st.integers(1, 80)), st.sampled_from(["stop", "length"]), st.booleans())
def test_a_stream_and_an_answer_at_once_agree_for_every_split(
    client: TestClient, engine: SplitEngine, text: str, places: list[int], reason: str, is_parallel: bool
) -> None:
    engine.chunks, engine.finish_reason = cut(text, places), reason
    body = {"tools": TOOLS, "parallel_tool_calls": is_parallel}
    events = stream(client, **body)
    final = events[-1]["response"]
    assert rebuilt(events) == final["output"]
    assert without_ids(final) == without_ids(create(client, **body))
    assert events[-1]["type"] == ("response.completed" if reason == "stop" else "response.incomplete")


def test_every_event_of_a_text_comes_in_its_order(client: TestClient, engine: SplitEngine) -> None:
    """`content_part.added`, or the last `done`, was missing in other servers."""
    assert [event["type"].removeprefix("response.") for event in stream(client)] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]


def test_reasoning_and_a_call_are_items_of_their_own(client: TestClient, engine: SplitEngine) -> None:
    engine.chunks = [f"<think>hm</think>It is {CALL}"]
    reasoning, message, call = create(client, tools=TOOLS)["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert message["content"][0]["text"].strip() == "It is"
    assert (call["name"], call["arguments"]) == ("add", '{"a": 1}')
    types = [event["type"] for event in stream(client, tools=TOOLS)]
    assert types.count("response.reasoning_text.done") == types.count("response.function_call_arguments.done") == 1


def test_without_parallel_calls_there_is_one_call(client: TestClient, engine: SplitEngine) -> None:
    engine.chunks = [CALL, "\n", CALL, " and so on"]
    assert [item["type"] for item in create(client, tools=TOOLS)["output"]] == ["function_call"] * 2 + ["message"]
    single = create(client, tools=TOOLS, parallel_tool_calls=False)["output"]
    assert [item["type"] for item in single] == ["function_call", "message"]


def test_usage_counts_cached_and_reasoning_tokens(client: TestClient, engine: SplitEngine) -> None:
    engine.chunks = ["<think>abc</think>de"]
    usage = create(client)["usage"]
    assert usage["input_tokens"] == 5
    assert usage["input_tokens_details"]["cached_tokens"] == 2
    assert usage["output_tokens"] == 20
    assert usage["output_tokens_details"] == {"reasoning_tokens": 3}
    assert stream(client)[-1]["response"]["usage"] == usage


def test_an_answer_that_was_cut_off_is_incomplete(client: TestClient, engine: SplitEngine) -> None:
    engine.finish_reason = "length"
    response = create(client, max_output_tokens=11)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"][-1]["status"] == "incomplete"
    assert engine.params[-1].max_tokens == 11


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["water", "<think>hm</think>water", "<think>hm"]), st.lists(st.integers(1, 22)))
def test_logprobs_are_those_of_the_content_for_every_split(
    client: TestClient, engine: SplitEngine, text: str, places: list[int]
) -> None:
    engine.chunks = cut(text, places)
    body = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    whole, events = create(client, **body), stream(client, **body)
    assert rebuilt(events) == events[-1]["response"]["output"]
    for response in (whole, events[-1]["response"]):
        item = response["output"][-1]
        entries = item["content"][0]["logprobs"] if item["type"] == "message" else []
        assert "".join(entry["token"] for entry in entries) == ("water" if text.endswith("water") else "")
        assert all(len(entry["top_logprobs"]) == 1 for entry in entries)


def test_log_probabilities_are_returned_only_if_they_are_included(client: TestClient, engine: SplitEngine) -> None:
    create(client, top_logprobs=3)
    assert engine.params[-1].logprobs is None
    create(client, top_logprobs=3, include=["message.output_text.logprobs"])
    assert engine.params[-1].logprobs == 3


def test_a_conversation_is_read_from_items(client: TestClient, engine: SplitEngine) -> None:
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "short answers"}]},
        {"type": "message", "role": "user", "content": "add 1"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "It is 2.", "annotations": []}]},
        {"role": "user", "content": "thanks"},
    ]
    create(client, input=items, instructions="be kind", tools=TOOLS)
    system, user, call, tool, answer, last = engine.prompts[-1]["messages"]
    assert system == {"role": "system", "content": "be kind\n\nshort answers"}
    assert user["content"] == "add 1"
    assert call["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert (call["content"], call["reasoning_content"]) == ("", "hm")
    assert (tool["role"], tool["tool_call_id"], tool["content"]) == ("tool", "c1", "2")
    assert (answer["content"], last["content"]) == ("It is 2.", "thanks")
    assert engine.prompts[-1]["tools"][0]["function"]["name"] == "add"


def test_a_response_continues_an_earlier_one(client: TestClient, engine: SplitEngine) -> None:
    first = create(client, instructions="be kind")
    second = create(client, input="and then?", previous_response_id=first["id"])
    third = create(client, input="why?", previous_response_id=second["id"])
    assert third["previous_response_id"] == second["id"]
    texts = [message["content"] for message in engine.prompts[-1]["messages"]]
    assert texts == ["what falls?", "water falls", "and then?", "water falls", "why?"]  # without the instructions


def test_a_streamed_response_is_kept_as_it_was_sent(client: TestClient, engine: SplitEngine) -> None:
    final = stream(client, metadata={"a": "b"})[-1]["response"]
    assert client.get(f"/v1/responses/{final['id']}").json() == final
    assert final["metadata"] == {"a": "b"}


def test_a_response_that_is_not_stored_is_unknown(client: TestClient, engine: SplitEngine) -> None:
    for response in (create(client, store=False), stream(client, store=False)[-1]["response"]):
        path = f"/v1/responses/{response['id']}"
        for method, suffix in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            answer = client.request(method, path + suffix)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        error = refused(client, previous_response_id=response["id"])
        assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")


def test_a_deleted_response_is_unknown(client: TestClient, engine: SplitEngine) -> None:
    response_id = create(client)["id"]
    assert client.delete(f"/v1/responses/{response_id}").json()["deleted"] is True
    assert client.get(f"/v1/responses/{response_id}").status_code == 404


def test_a_response_that_has_ended_cannot_be_cancelled_any_more(client: TestClient, engine: SplitEngine) -> None:
    response = create(client)
    assert client.post(f"/v1/responses/{response['id']}/cancel").json() == response


def test_input_items_come_in_pages(client: TestClient, engine: SplitEngine) -> None:
    items = [{"role": "user", "content": str(number)} for number in range(5)]
    path = f"/v1/responses/{create(client, input=items)['id']}/input_items"
    page = client.get(path, params={"limit": 2}).json()
    assert [item["content"][0]["text"] for item in page["data"]] == ["4", "3"]
    assert page["has_more"]
    rest = client.get(path, params={"after": page["last_id"]}).json()
    assert [item["content"][0]["text"] for item in rest["data"]] == ["2", "1", "0"]
    assert not rest["has_more"]
    first = client.get(path, params={"order": "asc", "limit": 1}).json()["data"][0]
    assert first["content"] == [{"type": "input_text", "text": "0"}]
    for query in ({"limit": 0}, {"limit": "many"}, {"order": "up"}, {"after": "x"}):
        assert client.get(path, params=query).status_code == 400


def test_keys_do_not_see_each_others_responses() -> None:
    keys = tuple(ApiKey(name=name, key=name * 8) for name in "ab")  # type: ignore[arg-type]
    with split_client(settings=ServingSettings(api_keys=keys)) as (client, engine):
        engine.chunks = ["yes"]
        headers = [{"authorization": f"Bearer {name * 8}"} for name in "ab"]
        response = client.post("/v1/responses", json={"input": "hi"}, headers=headers[0]).json()
        statuses = [client.get(f"/v1/responses/{response['id']}", headers=header).status_code for header in headers]
        assert statuses == [200, 404]


def test_the_least_recently_used_response_goes_first() -> None:
    with split_client(settings=ServingSettings(max_stored_responses=2)) as (client, engine):
        engine.chunks = ["yes"]
        first, second = create(client), create(client)
        client.get(f"/v1/responses/{first['id']}")
        third = create(client)
        kept = [client.get(f"/v1/responses/{response['id']}").status_code for response in (first, second, third)]
        assert kept == [200, 404, 200]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"truncation": "some"}, "truncation"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        ({"input": [{"type": "function_call", "name": "x"}]}, "input.0.call_id"),
        ({"n": 2}, "n"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"include": ["message.output_text.logprobs"], "tools": TOOLS}, "include"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    client: TestClient, engine: SplitEngine, body: dict[str, Any], param: str
) -> None:
    assert refused(client, **body)["param"] == param


def test_tools_other_than_functions_are_refused(client: TestClient, engine: SplitEngine) -> None:
    assert "web_search" in refused(client, tools=[{"type": "web_search"}])["message"]
    assert "nothing" in refused(client, tools=TOOLS, tool_choice={"type": "function", "name": "nothing"})["message"]


def test_a_schema_reaches_the_engine(client: TestClient, engine: SplitEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    response = create(client, text={"format": {"type": "json_schema", "name": "sum", "schema": schema}})
    assert engine.params[-1].structured_outputs.kind == "json"
    assert engine.params[-1].reasoning_end == "</think>"
    assert response["text"]["format"]["schema"] == schema
    create(client, text={"format": {"type": "json_object"}})
    assert engine.params[-1].structured_outputs.json_object


def test_allowed_tools_are_a_choice_of_the_tools(client: TestClient, engine: SplitEngine) -> None:
    tools = [*TOOLS, {"type": "function", "name": "divide"}]
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "divide"}]}
    create(client, tools=tools, tool_choice=choice)
    assert [tool["function"]["name"] for tool in engine.prompts[-1]["tools"]] == ["divide"]
    create(client, tools=tools, tool_choice="none")
    assert "tools" not in engine.prompts[-1]


def test_no_effort_turns_reasoning_off(client: TestClient, engine: SplitEngine) -> None:
    create(client, reasoning={"effort": "none"})
    assert engine.prompts[-1]["chat_template_kwargs"] == {"enable_thinking": False, "reasoning_effort": "none"}
    assert engine.params[-1].reasoning_end is None


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (DeadlineExceeded("too late"), "failed", "deadline_exceeded"),
        (RequestAborted("x"), "cancelled", "request_aborted"),
    ],
)
def test_a_stream_that_fails_ends_with_the_failed_response(
    client: TestClient, engine: SplitEngine, error: Exception, status: str, code: str
) -> None:
    engine.error = error
    events = stream(client)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert events[-2]["code"] == code
    response = events[-1]["response"]
    assert (response["status"], response["error"]["code"]) == (status, "server_error")
    assert response["output"][0]["content"][0]["text"] == "water falls"
    assert client.get(f"/v1/responses/{response['id']}").json() == response


def test_a_conversation_that_is_too_long_loses_its_oldest_turns_if_the_client_wishes() -> None:
    items: list[Any] = [{"role": "developer", "content": "be kind"}]
    for number in range(40):
        items += [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "water " * 5}]
    items.append({"role": "user", "content": "what falls?"})
    with client_of() as client:
        refusal = client.post("/v1/responses", json={"input": items, "max_output_tokens": 20})
        assert refusal.json()["error"]["code"] == "context_length_exceeded"
        body = {"input": items, "max_output_tokens": 20, "truncation": "auto"}
        response = client.post("/v1/responses", json=body).json()
        assert (response["truncation"], response["usage"]["output_tokens"]) == ("auto", 20)
        assert 512 - 20 - 60 < response["usage"]["input_tokens"] <= 512 - 20
        del items[0]
        assert client.post("/v1/responses", json=body).json()["usage"]["input_tokens"] <= 512 - 20
        body["input"] = "water " * 1000
        assert client.post("/v1/responses", json=body).json()["error"]["code"] == "context_length_exceeded"


def test_a_wrong_method_is_told_all_that_are_right(client: TestClient, engine: SplitEngine) -> None:
    answer = client.patch("/v1/responses/x")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET, HEAD")
    assert client.get("/v1/responses").headers["allow"] == "POST"
    assert client.patch("/v1/responses/input_tokens").headers["allow"] == "POST"


def test_input_tokens_are_counted(client: TestClient, engine: SplitEngine) -> None:
    answer = client.post("/v1/responses/input_tokens", json={"input": "what falls?"}).json()
    assert answer["object"] == "response.input_tokens"
    assert answer["input_tokens"] > 10
