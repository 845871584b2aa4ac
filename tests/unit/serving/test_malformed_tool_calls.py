"""Malformed calls through the server: no error, no lost call, and the same answer however the text was cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic_core import from_json
from starlette.testclient import TestClient

from penstock.serving import ServingSettings
from tests.malformed_tool_calls import FAILURES, Failure
from tests.unit.serving import test_anthropic, test_chat_tools, test_responses
from tests.unit.serving.service import events
from tests.unit.serving.split_engine import named_events, split_client
from tests.unit.tools.texts import TOOLS

SIZES = (1, 2, 3, 7)
TASK = "find tea"
Answer = tuple[str, list[tuple[str, str]]]  # the text, and the calls: name and arguments


def chat(client: TestClient, stream: bool) -> Answer:
    """A chat completion."""
    messages = [{"role": "user", "content": TASK}]
    body = {"messages": messages, "tools": [tool.to_dict() for tool in TOOLS], "stream": stream}
    answer = client.post("/v1/chat/completions", json=body)
    if stream:
        message, _ = test_chat_tools.assembled(events(answer)[:-1])
        return message["content"], [(call["name"], call["arguments"]) for call in message["tool_calls"]]
    message = answer.json()["choices"][0]["message"]
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return message["content"] or "", [(function["name"], function["arguments"]) for function in functions]


def response(client: TestClient, stream: bool) -> Answer:
    """A response."""
    tools = [{"type": "function", "name": tool.name, "parameters": tool.parameters} for tool in TOOLS]
    answer = client.post("/v1/responses", json={"input": TASK, "tools": tools, "stream": stream})
    output = test_responses.rebuilt(named_events(answer)) if stream else answer.json()["output"]
    texts = [part["text"] for item in output if item["type"] == "message" for part in item["content"]]
    calls = [item for item in output if item["type"] == "function_call"]
    return "".join(texts), [(call["name"], call["arguments"]) for call in calls]


def message(client: TestClient, stream: bool) -> Answer:
    """An Anthropic message, in which arguments are an object: as much of one as there is."""
    tools = [{"name": tool.name, "input_schema": {"type": "object", **tool.parameters}} for tool in TOOLS]
    messages = [{"role": "user", "content": TASK}]
    body = {"model": "split", "max_tokens": 300, "messages": messages, "tools": tools, "stream": stream}
    answer = client.post("/v1/messages", json=body)
    parts = named_events(answer) if stream else []
    blocks = test_anthropic.rebuilt(parts)["content"] if stream else answer.json()["content"]
    for index, block in enumerate(blocks if stream else ()):
        texts = [
            part["delta"].get("partial_json", "") for part in parts if "delta" in part and part.get("index") == index
        ]
        if block["type"] == "tool_use" and any(texts):
            block["input"] = as_object("".join(texts))
    text = "".join(block["text"] for block in blocks if block["type"] == "text")
    return text, [(block["name"], json.dumps(block["input"])) for block in blocks if block["type"] == "tool_use"]


def as_object(text: str) -> Any:
    try:
        value = from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


@pytest.mark.parametrize("read", [chat, response, message])
@pytest.mark.parametrize("format", sorted({failure.format for failure in FAILURES}))
def test_every_cut_of_a_malformed_call_gives_the_same_answer(
    format: str, read: Callable[[TestClient, bool], Answer]
) -> None:
    with split_client(settings=ServingSettings(tool_format=format)) as (client, engine):
        for failure in (each for each in FAILURES if each.format == format):
            engine.chunks = [failure.text]
            whole = read(client, False)
            check_calls(failure, [name for name, arguments in whole[1] if is_object(arguments)], read is message)
            for size in SIZES:
                engine.chunks = [failure.text[start : start + size] for start in range(0, len(failure.text), size)]
                assert read(client, True) == whole, (failure.text, size)


def check_calls(failure: Failure, names: list[str], is_repaired: bool) -> None:
    """The complete calls are there, in order; and no other, unless malformed arguments were made an object."""
    complete = [name for status, name in failure.attempts if status == "complete"]
    attempted = [name for _, name in failure.attempts if name is not None]
    assert names in ([complete, attempted] if is_repaired else [complete]), failure.text
