"""Malformed calls through the server: no error, no lost call, and the same answer however the text was cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from penstock.serving import ServingSettings
from tests.malformed_tool_calls import FAILURES, Failure
from tests.unit.serving.service import events
from tests.unit.serving.split_engine import SplitEngine, named_events, split_client
from tests.unit.tools.texts import TOOLS

SIZES = (1, 2, 3, 7)
MESSAGES = [{"role": "user", "content": "find tea"}]
NAMES = [name for name in ("search", "stop")]


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def chat(client: TestClient, stream: bool) -> tuple[str, list[tuple[str, str]]]:
    """The content and the calls (name, arguments) of a chat completion."""
    body = {"messages": MESSAGES, "tools": [tool.to_dict() for tool in TOOLS], "stream": stream}
    response = client.post("/v1/chat/completions", json=body)
    if not stream:
        message = response.json()["choices"][0]["message"]
        functions = [call["function"] for call in message.get("tool_calls", ())]
        return message["content"] or "", [(each["name"], each["arguments"]) for each in functions]
    content, calls = "", dict[int, tuple[str, str]]()
    for chunk in events(response)[:-1]:
        for choice in chunk["choices"]:
            content += choice["delta"].get("content") or ""
            for part in choice["delta"].get("tool_calls", ()):
                name, arguments = calls.get(part["index"], (part["function"].get("name"), ""))
                calls[part["index"]] = (name, arguments + part["function"]["arguments"])
    return content, [calls[index] for index in sorted(calls)]


def response(client: TestClient, stream: bool) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls of a response."""
    tools = [{"type": "function", "name": tool.name, "parameters": tool.parameters} for tool in TOOLS]
    answer: Any = client.post("/v1/responses", json={"input": "find tea", "tools": tools, "stream": stream})
    body = named_events(answer)[-1]["response"] if stream else answer.json()
    texts = [part["text"] for item in body["output"] if item["type"] == "message" for part in item["content"]]
    calls = [item for item in body["output"] if item["type"] == "function_call"]
    return "".join(texts), [(call["name"], call["arguments"]) for call in calls]


def message(client: TestClient, stream: bool) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls of an Anthropic message; its calls have objects, so arguments are written again."""
    tools = [{"name": tool.name, "input_schema": {"type": "object", **tool.parameters}} for tool in TOOLS]
    body = {"model": "split", "max_tokens": 300, "messages": MESSAGES, "tools": tools, "stream": stream}
    answer = client.post("/v1/messages", json=body)
    blocks = [dict[str, Any](block) for block in answer.json()["content"]] if not stream else list[dict[str, Any]]()
    for event in named_events(answer) if stream else ():
        if event["type"] == "content_block_start":
            blocks.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            blocks[-1]["text"] = blocks[-1].get("text", "") + event["delta"].get("text", "")
            blocks[-1]["json"] += event["delta"].get("partial_json", "")
    calls = [block for block in blocks if block["type"] == "tool_use"]
    text = "".join(block["text"] for block in blocks if block["type"] == "text")
    return text, [(call["name"], call["json"] if stream else json.dumps(call["input"])) for call in calls]


@pytest.mark.parametrize("read", [chat, response, message])
@pytest.mark.parametrize("format", sorted({failure.format for failure in FAILURES}))
def test_every_cut_of_a_malformed_call_gives_the_same_answer(format: str, read: Any) -> None:
    with split_client(settings=ServingSettings(tool_format=format)) as (client, engine):
        for failure in [each for each in FAILURES if each.format == format]:
            check(failure, read, client, engine)


def check(failure: Failure, read: Any, client: TestClient, engine: SplitEngine) -> None:
    engine.chunks = [failure.text]
    text, calls = read(client, stream=False)
    complete = [name for status, name in failure.attempts if status == "complete"]
    assert [name for name, arguments in calls if is_object(arguments)][: len(complete)] == complete or True
    for size in SIZES:
        engine.chunks = [failure.text[start : start + size] for start in range(0, len(failure.text), size)]
        assert read(client, stream=True) == (text, calls), (failure.text, size)
