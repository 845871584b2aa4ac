"""Grammars of required calls, tried with llguidance on a real vocabulary: what they admit, and what not."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

import penstock
from penstock import GrammarError, RequestError, StructuredOutputs
from penstock.tools import FORMATS, Tool, constraint, parse_output, read_tools

llguidance = pytest.importorskip("llguidance")

TOOLS = read_tools(
    [
        {
            "name": "search",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string"},
                    "n": {"type": "integer"},
                    "tags": {"type": "array", "items": {"type": "string"}},
                    "sort": {"enum": ["new", "old"]},
                },
                "required": ["query"],
                "additionalProperties": False,
            },
        },
        {"name": "stop"},
    ]
)
SEARCH = {"query": 'say "tea"', "n": 5, "tags": ["a", "b"], "sort": "new"}
# A call of each tool in each format, as the grammar lays it out.
CALLS: dict[str, str] = {
    "json": '[{"name": "search", "arguments": {"query": "say \\"tea\\"", "n": 5, "tags": ["a", "b"], "sort": "new"}}, '
    '{"name": "stop", "arguments": {}}]',
    "llama3": '{"name": "search", "parameters": {"query": "say \\"tea\\"", "n": 5, "tags": ["a", "b"], "sort": "new"}}'
    '; {"name": "stop", "parameters": {}}',
    "mistral": '[TOOL_CALLS][{"name": "search", "arguments": {"query": "say \\"tea\\"", "n": 5, "tags": ["a", "b"], '
    '"sort": "new"}}, {"name": "stop", "arguments": {}}]',
    "hermes": '<tool_call>\n{"name": "search", "arguments": {"query": "say \\"tea\\"", "n": 5, "tags": ["a", "b"], '
    '"sort": "new"}}\n</tool_call>\n<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>',
    "xml": '<function_calls>\n<invoke name="search">\n<parameter name="query">say "tea"</parameter>\n'
    '<parameter name="n">5</parameter>\n<parameter name="tags">["a", "b"]</parameter>\n'
    '<parameter name="sort">new</parameter>\n</invoke>\n<invoke name="stop">\n</invoke>\n</function_calls>',
    "qwen3_coder": '<tool_call>\n<function=search>\n<parameter=query>\nsay "tea"\n</parameter>\n<parameter=n>\n5\n'
    '</parameter>\n<parameter=tags>\n["a", "b"]\n</parameter>\n<parameter=sort>\nnew\n</parameter>\n</function>\n'
    "</tool_call>\n<tool_call>\n<function=stop>\n</function>\n</tool_call>",
    "function": 'search(query="say \\"tea\\"", n=5, tags=["a", "b"], sort="new")\nstop()',
    "pythonic": '[search(query="say \\"tea\\"", n=5, tags=["a", "b"], sort="new"), stop()]',
}


@cache
def vocabulary() -> Any:
    """The tokens of the model in the package."""
    from llguidance import LLTokenizer

    path = Path(penstock.__file__).parent / "demo" / "model" / "tokenizer.json"
    return LLTokenizer(path.read_text(encoding="utf-8"))


def admits(structure: StructuredOutputs | None, text: str) -> bool:
    """Whether the text is a whole output that the grammar admits."""
    assert structure is not None
    matcher = llguidance.LLMatcher(vocabulary(), llguidance.LLMatcher.grammar_from_lark(structure.source), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = vocabulary().tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("format", CALLS)
def test_required_admits_calls_in_the_format_and_the_parser_reads_them(format: str) -> None:
    assert admits(constraint(TOOLS, "required", format), CALLS[format])
    output = parse_output(CALLS[format], format, TOOLS)
    assert [(call.name, call.arguments) for call in output.tool_calls] == [("search", SEARCH), ("stop", {})]
    assert output.content == ""


@pytest.mark.parametrize("format", CALLS)
def test_required_refuses_other_text(format: str) -> None:
    structure = constraint(TOOLS, "required", format)
    for text in ("", "Hello.", f"Hello. {CALLS[format]}", CALLS[format].replace("search", "delete")):
        assert not admits(structure, text)
    assert not admits(structure, CALLS[format].replace("5", "five"))
    assert not admits(structure, CALLS[format].replace("new", "next"))


@pytest.mark.parametrize("format", CALLS)
def test_without_parallel_a_second_call_is_refused(format: str) -> None:
    assert not admits(constraint(TOOLS, "required", format, parallel=False), CALLS[format])


@pytest.mark.parametrize("format", CALLS)
def test_named_function_is_the_only_one(format: str) -> None:
    choice = {"type": "function", "function": {"name": "stop"}}
    structure = constraint(TOOLS, choice, format)
    assert not admits(structure, CALLS[format])
    assert structure is not None
    assert "search" not in structure.source


def test_every_format_has_a_grammar() -> None:
    assert {format.name for format in FORMATS.values()} == CALLS.keys()


@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_choices_that_require_nothing_constrain_nothing(choice: str | None) -> None:
    assert constraint(TOOLS, choice, "json") is None


@pytest.mark.parametrize(
    ("text", "is_admitted"),
    [("f()", True), ("f(b=1)", True), ("f(a=1, c=2)", True), ("f(, b=1)", False), ("f(b=1, a=2)", False)],
)
def test_optional_arguments_may_be_left_out(text: str, is_admitted: bool) -> None:
    parameters = {"type": "object", "properties": {name: {"type": "integer"} for name in "abc"}}
    structure = constraint([Tool("f", "", parameters)], "required", "function")
    assert admits(structure, text) is is_admitted


def test_a_schema_may_refer_to_its_definitions() -> None:
    parameters = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/place"}},
        "required": ["at"],
        "$defs": {"place": {"type": "array", "items": {"type": "number"}}},
    }
    tools = [Tool("go", "", parameters)]
    assert admits(constraint(tools, "required", "json"), '{"name": "go", "arguments": {"at": [1.5, 2]}}')
    assert admits(constraint(tools, "required", "pythonic"), "[go(at=[1.5, 2])]")
    assert not admits(constraint(tools, "required", "pythonic"), '[go(at="home")]')


@pytest.mark.parametrize(
    ("parameters", "keyword"),
    [
        ({"type": "object", "properties": {"q": {"type": "string", "pattern": "a+"}}}, "pattern"),
        ({"type": "object", "properties": {"q": {"type": "string"}}, "minProperties": 1}, "minProperties"),
        ({"type": "object", "properties": {"a b": {"type": "string"}}}, "a b"),
    ],
)
def test_what_markup_cannot_enforce_is_refused_by_name(parameters: dict[str, object], keyword: str) -> None:
    with pytest.raises(GrammarError, match=keyword):
        constraint([Tool("f", "", parameters)], "required", "xml")


def test_a_choice_that_is_no_tool_is_refused() -> None:
    with pytest.raises(RequestError, match="'delete', which is not among the tools"):
        constraint(TOOLS, {"type": "tool", "name": "delete"}, "json")
    with pytest.raises(RequestError, match="there are no tools"):
        constraint([], "required", "json")


def test_marker_can_be_a_special_token() -> None:
    structure = constraint(TOOLS, "required", "mistral", special_tokens={"[TOOL_CALLS]": 7})
    assert structure is not None
    assert structure.source.startswith('start: <[7]> "["')
