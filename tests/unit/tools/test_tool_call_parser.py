"""`ToolCall` and `ToolCallParser`: calls in a whole text, with what they were written as and where."""

from __future__ import annotations

import json

import pytest

from penstock.tools import ToolCall, ToolCallParser

TOOLS = [{"name": "search", "description": "Search the web", "parameters": {"query": "string", "n": "integer"}}]


def test_bare_json_is_a_call() -> None:
    (call,) = ToolCallParser().parse('Sure: {"tool": "search", "args": {"query": "AI"}} as asked.')
    assert (call.name, call.arguments) == ("search", {"query": "AI"})
    assert call.raw_text == '{"tool": "search", "args": {"query": "AI"}}'


def test_a_fenced_list_of_other_things_is_no_call() -> None:
    assert ToolCallParser.parse_json_tool_calls('```json\n[1, "a", null]\n```') == []
    assert ToolCallParser.parse_json_tool_calls('```json\n[{"city": "Oslo"}]\n```') == []
    assert ToolCallParser.parse_json_tool_calls('The data: {"name": "Ada"}') == []


def test_calls_in_one_fence_have_places_of_their_own() -> None:
    text = 'Two:\n```json\n[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]\n```\n'
    calls = ToolCallParser.parse_json_tool_calls(text)
    assert [call.name for call in calls] == ["a", "b"]
    assert [text[call.start_pos : call.end_pos] for call in calls] == [call.raw_text for call in calls]
    assert calls[0].end_pos <= calls[1].start_pos


@pytest.mark.parametrize(
    "text",
    [
        '<function_calls><invoke name="search"><parameter name="query">5</parameter><parameter name="n">5</parameter>'
        "</invoke></function_calls>",
        "<function_calls><invoke><tool_name>search</tool_name><parameters><query>5</query><n>5</n></parameters>"
        "</invoke></function_calls>",
    ],
)
def test_both_styles_of_markup_are_read_and_converted_by_schema(text: str) -> None:
    (call,) = ToolCallParser.parse_xml_tool_calls(text, TOOLS)
    assert (call.name, call.arguments) == ("search", {"query": "5", "n": 5})
    assert call.raw_text == text


def test_only_known_functions_are_calls() -> None:
    text = 'f(x) prints print("a, b") and search(query="a, (b)", n=[1,2])'
    (call,) = ToolCallParser.parse_function_style_calls(text, TOOLS)
    assert (call.name, call.arguments) == ("search", {"query": "a, (b)", "n": [1, 2]})
    assert call.raw_text == 'search(query="a, (b)", n=[1,2])'
    assert ToolCallParser.parse_function_style_calls(text) == []


@pytest.mark.parametrize(
    "text", ['{"name": "search", "arguments": {"query": "A', '{"name": "search", "arguments": {,}}']
)
def test_unfinished_and_malformed_calls_are_none(text: str) -> None:
    assert ToolCallParser("json", TOOLS).parse(text) == []


def test_a_call_is_written_as_openai_does() -> None:
    call = ToolCall("search", {"query": "é"})
    assert call.to_dict() == {
        "id": call.id,
        "type": "function",
        "function": {"name": "search", "arguments": '{"query": "é"}'},
    }
    (parsed,) = ToolCallParser("json").parse('{"name": "search", "arguments": {"query":"é"}}')
    function = parsed.to_dict()["function"]
    assert function == {"name": "search", "arguments": '{"query":"é"}'}
    json.dumps(parsed.to_dict())
