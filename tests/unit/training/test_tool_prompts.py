"""How a prompt tells a model of its tools."""

from __future__ import annotations

from typing import Any

import pytest

from penstock import RequestError
from penstock.training.tool_prompts import read_available_tools, with_tools

SEARCH = {"name": "search", "description": "Search the web", "parameters": {"query": "string"}}
WRITES_TOOLS = "{% if tools %}{{ tools }}<tool_call>{% endif %}{{ messages }}"
WITHOUT_TOOLS = "{{ messages }}"


def test_tools_are_mappings_or_names() -> None:
    """B0-13: names alone raised `AttributeError`."""
    tools = read_available_tools(["calculator", SEARCH, {"type": "function", "function": {"name": "open"}}])
    assert [tool.name for tool in tools] == ["calculator", "search", "open"]
    assert read_available_tools(None) == []


def test_a_name_that_is_not_in_a_list_is_refused() -> None:
    """A string was read as one tool for each of its characters."""
    with pytest.raises(RequestError, match="must be a list of tools, not 'go'"):
        read_available_tools("go")


@pytest.mark.parametrize("format", ["json", "xml", "function", "hermes"])
def test_instructions_are_those_of_the_format_that_is_read(format: str) -> None:
    """B0-13: the prompt asked for JSON, whatever the parser read."""
    example = {"json": '{"name": "FUNCTION"', "xml": "<invoke", "function": "FUNCTION(", "hermes": "<tool_call>"}[
        format
    ]
    tools = read_available_tools([SEARCH])
    text: Any = with_tools("Find tea.", tools, format, None)
    assert example in text
    assert text.endswith("\n\nFind tea.")
    system, user = with_tools("Find tea.", tools, format, WITHOUT_TOOLS)
    assert isinstance(system, dict)
    assert system["role"] == "system"
    assert example in system["content"]
    assert user == {"role": "user", "content": "Find tea."}


def test_template_writes_the_tools_if_it_does_so_for_this_format() -> None:
    tools = read_available_tools([SEARCH])
    chat: Any = with_tools("Find tea.", tools, "hermes", WRITES_TOOLS)
    assert chat["messages"] == [{"role": "user", "content": "Find tea."}]
    assert chat["tools"][0]["function"]["name"] == "search"
    assert isinstance(with_tools("Find tea.", tools, "json", WRITES_TOOLS), list)


def test_system_message_of_a_chat_is_extended() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Find tea."}]
    system, user = with_tools(chat, read_available_tools([SEARCH]), "json", WITHOUT_TOOLS)
    assert isinstance(system, dict)
    assert system["content"].startswith("Be brief.\n\nYou may call")
    assert user == chat[1]
    assert chat[0]["content"] == "Be brief."


def test_token_ids_cannot_be_told_of_tools() -> None:
    assert with_tools([1, 2], [], "json", None) == [1, 2]
    with pytest.raises(RequestError, match="put them into the prompt yourself"):
        with_tools([1, 2], read_available_tools([SEARCH]), "json", None)
