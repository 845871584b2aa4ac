"""What an output must be, over HTTP: schemas, choices, required calls; what cannot be enforced is a 400 by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.serving.service import events, replying
from tests.unit.serving.test_chat_tools import QUESTION, TEMPLATE, THINKING, TOOLS

URL = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "degrees": {"type": "integer"}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
ASK = {"messages": QUESTION["messages"], "temperature": 0, "max_tokens": 200}


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}}


@pytest.mark.parametrize("reply", ['{"city": "Bern", "degrees": 7}', "I think that it rains.", '{"town": 5}'])
def test_an_answer_follows_its_schema_whatever_the_model_would_say(reply: str) -> None:
    with replying([reply], TEMPLATE) as client:
        body = {**ASK, "response_format": schema_format(SCHEMA)}
        choice = client.post(URL, json=body).json()["choices"][0]
        answer = choice["message"]["content"]
        if choice["finish_reason"] == "stop":
            assert set(json.loads(answer)) == {"city", "degrees"}
        *chunks, _ = events(client.post(URL, json={**body, "stream": True}))
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == answer
        if reply.startswith('{"city"'):
            assert (json.loads(answer), choice["finish_reason"]) == (json.loads(reply), "stop")


def test_choices_expressions_and_grammars_are_followed_in_both_apis() -> None:
    structures = [{"choice": ["yes", "no"]}, {"regex": "yes|no"}, {"grammar": 'start: "yes" | "no"'}]
    with replying(["no idea"], TEMPLATE) as client:
        for structure in structures:
            body = {**ASK, "structured_outputs": structure}
            assert client.post(URL, json=body).json()["choices"][0]["message"]["content"] == "no"
            body = {"prompt": "x", "structured_outputs": structure, "temperature": 0}
            assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == "no"
            ids = {"token_ids": [5], "sampling_params": {"structured_outputs": structure, "temperature": 0}}
            assert client.post("/inference/v1/generate", json=ids).status_code == 200


def test_responses_and_messages_take_vllms_structures_too() -> None:
    """Regression: `structured_outputs` had no effect in these two APIs."""
    with replying(["no idea"], TEMPLATE) as client:
        more = {"structured_outputs": {"choice": ["yes", "no"]}, "temperature": 0}
        response = client.post("/v1/responses", json={"input": "x", **more}).json()
        assert response["output"][0]["content"][0]["text"] == "no"
        body = {"messages": QUESTION["messages"], "max_tokens": 9, **more}
        assert client.post("/v1/messages", json=body).json()["content"][0]["text"] == "no"
        body["output_config"] = {"format": {"type": "json_schema", "schema": SCHEMA}}
        assert "output_config.format" in client.post("/v1/messages", json=body).json()["error"]["message"]


def test_a_constraint_begins_behind_the_reasoning() -> None:
    """It constrained the reasoning, or nothing."""
    with replying(['<think>\nIs it "no"?\n</think>\n\nno'], THINKING) as client:
        body = {**ASK, "structured_outputs": {"choice": ["yes", "no"]}}
        message = client.post(URL, json=body).json()["choices"][0]["message"]
        assert (message["reasoning"], message["content"]) == ('Is it "no"?', "no")
        stopped = client.post(URL, json={**ASK, "stop": "no"}).json()["choices"][0]
        assert stopped["message"]["reasoning"] == 'Is it "no"?'
        assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", "no")


def test_a_template_that_ends_the_reasoning_itself_is_noticed() -> None:
    template = THINKING + "{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}"
    with replying(["nothing of it"], template) as client:
        body = {**ASK, "structured_outputs": {"choice": ["yes", "no"]}}
        assert client.post(URL, json=body).json()["choices"][0]["message"]["content"] == "no"


@pytest.mark.parametrize(
    ("structure", "word"),
    [
        ({"response_format": schema_format({"type": "array", "uniqueItems": True})}, "uniqueItems"),
        (
            {"response_format": schema_format({"type": "object", "unevaluatedProperties": False})},
            "unevaluatedProperties",
        ),
        ({"response_format": {"type": "json_schema"}}, "schema"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"structured_outputs": {"regex": "("}}, "regex"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "nothing"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one"),
        ({"structured_outputs": {}}, "exactly one"),
        ({"structured_outputs": {"choice": []}}, "choice"),
        ({"guided_json": {"type": "integer"}}, "structured_outputs"),
        ({"guided_choice": ["yes", "no"]}, "structured_outputs"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_enforced_is_a_400_that_says_what(structure: dict[str, Any], word: str, stream: bool) -> None:
    """It was ignored without a word."""
    with replying(["x"], TEMPLATE) as client:
        response = client.post(URL, json={**ASK, **structure, "stream": stream})
        assert response.status_code == 400
        assert word in response.json()["error"]["message"]


def test_a_tool_whose_schema_cannot_be_enforced_is_refused_by_its_keyword_and_without_our_grammar() -> None:
    """Regression: the error quoted the grammar that the server had made of the tools."""
    parameters = {"type": "object", "properties": {"a": {"not": {}}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    with replying(["x"], TEMPLATE) as client:
        response = client.post(URL, json={**ASK, "tools": tools, "tool_choice": "required"})
        message = response.json()["error"]["message"]
        assert response.status_code == 400
        assert message.endswith('failed to compile JSON schema: Unimplemented keys: ["not"]')


def test_alternatives_that_overlap_are_refused_without_advice_that_nobody_can_follow() -> None:
    schema = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
    with replying(["x"], TEMPLATE) as client:
        message = client.post(URL, json={**ASK, "response_format": schema_format(schema)}).json()["error"]["message"]
        assert message.endswith("oneOf constraints are not supported.")


NAMED = {"type": "function", "function": {"name": "time"}}


@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")])
def test_a_required_call_comes_even_if_the_model_would_rather_talk(choice: Any, reason: str) -> None:
    with replying(["Let us talk."], TEMPLATE) as client:
        body = {**ASK, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
        whole = client.post(URL, json=body).json()["choices"][0]
        chunks = events(client.post(URL, json={**body, "stream": True}))[:-1]
        reasons = [part["finish_reason"] for chunk in chunks for part in chunk["choices"] if part["finish_reason"]]
        assert reasons == [whole["finish_reason"]]
        (call,) = whole["message"]["tool_calls"]
        assert choice == "required" or call["function"]["name"] == "time"
        if whole["finish_reason"] != "length":
            assert whole["finish_reason"] == reason
            assert isinstance(json.loads(call["function"]["arguments"]), dict)


def test_a_schema_beside_tools_leaves_the_model_its_tools() -> None:
    call = '<tool_call>\n{"name": "time", "arguments": {"city": "Bern"}}\n</tool_call>'
    for reply in (call, '{"city": "Bern", "degrees": 7}'):
        with replying([reply], TEMPLATE) as client:
            body = {**ASK, "tools": TOOLS, "response_format": schema_format(SCHEMA)}
            choice = client.post(URL, json=body).json()["choices"][0]
            if reply == call:
                assert choice["message"]["tool_calls"][0]["function"]["name"] == "time"
            else:
                assert json.loads(choice["message"]["content"]) == json.loads(reply)
