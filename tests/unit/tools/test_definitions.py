"""Tools of every common shape become one record; what is wrong is named by its place."""

from __future__ import annotations

import pytest

from penstock import RequestError
from penstock.tools import Tool, ToolChoice, read_tool_choice, read_tools

SCHEMA = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
SEARCH = Tool("search", "Finds.", SCHEMA)


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": {"name": "search", "description": "Finds.", "parameters": SCHEMA}},
        {"type": "function", "name": "search", "description": "Finds.", "parameters": SCHEMA, "strict": True},
        {"name": "search", "description": "Finds.", "input_schema": SCHEMA},
        {"type": "custom", "name": "search", "description": "Finds.", "input_schema": SCHEMA},
        {"name": "search", "description": "Finds.", "parameters": {"query": "string"}},
        {"name": "search", "description": "Finds.", "parameters": {"query": {"type": "string"}}},
        SEARCH,
    ],
)
def test_every_shape_gives_the_same_record(tool: object) -> None:
    assert read_tools([tool]) == [SEARCH]


def test_a_tool_is_written_as_chat_templates_expect() -> None:
    assert SEARCH.to_dict() == {
        "type": "function",
        "function": {"name": "search", "description": "Finds.", "parameters": SCHEMA},
    }
    assert read_tools([SEARCH.to_dict()]) == [SEARCH]


def test_a_tool_without_parameters_takes_none() -> None:
    for tool in ({"name": "stop"}, {"name": "stop", "parameters": {}}, {"name": "stop", "parameters": None}):
        (record,) = read_tools([tool])
        assert record.parameters == {"type": "object", "properties": {}, "additionalProperties": False}


def test_no_tools_are_an_empty_list() -> None:
    assert read_tools(None) == []
    assert read_tools([]) == []


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("search", "tools must be a list of tools"),
        ({"name": "search"}, "tools must be a list of tools"),
        (5, "tools must be a list of tools"),
        (["search"], r"tools\[0\] must be an object with a name"),
        ([{"name": "stop"}, {"name": "no spaces"}], r"tools\[1\].name must be 1 to 64 letters"),
        ([{"name": "a" * 65}], r"tools\[0\].name must be"),
        ([{"name": "a\n"}], r"tools\[0\].name must be"),
        ([{"type": "function", "function": {}}], r"tools\[0\].function.name must be"),
        ([{"type": "function", "function": 5}], r"tools\[0\].function must be an object"),
        ([{"type": "web_search_20250305", "name": "web_search"}], r'tools\[0\].type: only "function" is supported'),
        ([{"name": "a"}, {"name": "a"}], r"tools\[1\].name: 'a' is the name of two tools"),
        ([{"name": "a", "description": 5}], r"tools\[0\].description must be a string"),
        ([{"name": "a", "parameters": []}], r"tools\[0\].parameters must be a JSON schema"),
        ([{"name": "a", "input_schema": {"type": "array"}}], r"tools\[0\].input_schema.type must be .object."),
        (
            [{"name": "a", "parameters": {"type": "object", "properties": []}}],
            r"parameters.properties must be an object",
        ),
        ([{"name": "a", "parameters": {"query": "text"}}], r"tools\[0\].parameters.query must be a type"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(tools: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_tools(tools)


def test_the_number_of_tools_is_bounded() -> None:
    tools = [{"name": f"f{i}"} for i in range(129)]
    with pytest.raises(RequestError, match="tools has 129 tools; at most 128 are allowed"):
        read_tools(tools)
    assert len(read_tools(tools, max_tools=129)) == 129


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice("auto")),
        ("auto", ToolChoice("auto")),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "any"}, ToolChoice("required")),
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice("auto")),
        ({"type": "tool", "name": "search"}, ToolChoice("named", "search")),
        ({"type": "function", "name": "search"}, ToolChoice("named", "search")),
        ({"type": "function", "function": {"name": "search"}}, ToolChoice("named", "search")),
        (ToolChoice("none"), ToolChoice("none")),
    ],
)
def test_choices_of_every_shape(choice: object, expected: ToolChoice) -> None:
    assert read_tool_choice(choice, [SEARCH]) == expected


@pytest.mark.parametrize(
    "choice", ["search", 5, [], {}, {"type": 5}, {"type": "function"}, {"type": "tool", "name": []}]
)
def test_other_choices_are_refused(choice: object) -> None:
    with pytest.raises(RequestError, match="tool_choice"):
        read_tool_choice(choice, [SEARCH])
