"""Every format, as a stream and as a whole: what is a call, what is content, and that nothing is lost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock import RequestError
from penstock.tools import (
    FORMATS,
    REASONING_FORMATS,
    ContentDelta,
    OutputParser,
    ReasoningSplitter,
    ToolCallDelta,
    format_named,
    parse_output,
)
from tests.unit.tools.texts import TEXTS, TOOLS, fed, plain, split

ARGUMENTS = '{"query": "tea, (green)", "n": 5, "tags": ["a", "b"]}'
NAMES = list(TEXTS)
# What markers, calls and their surroundings are made of.
FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<function=search>", "<parameter=query>", "\n</parameter>", "</function>"),
    *("<function_calls>", '<invoke name="search">', "<invoke>", "<tool_name>search</tool_name>", "<parameters>"),
    *('<parameter name="n">', "</parameter>", "</invoke>", "</function_calls>", "<n>", "</n>", "</parameters>"),
    *("[TOOL_CALLS]", "search[ARGS]", "[ARGS]", "<|python_tag|>", "```json\n", "```", "search(", "[search(", "stop()"),
    *('{"name": "search", "arguments": ', '{"query": "a\\n"}', '"n": 5', "}", "{", "[", "]", ")", "(", ",", ", ", ";"),
    *('{"name"', ': "stop"', '"', "'", "\\", "=", "query=", "5", "-", "#", " ", "\n", "\n\n", "a", "Hello", "<", "{}"),
    *("<think>", "</think>"),
]
OUTPUTS = st.lists(st.sampled_from(FRAGMENTS), max_size=24).map("".join)
PLACES = st.lists(st.integers(0, 300), max_size=12)


@pytest.mark.parametrize("name", NAMES)
def test_calls_and_the_text_around_them_are_told_apart(name: str) -> None:
    pieces = plain(fed(OutputParser(name, TOOLS), [TEXTS[name]]))
    assert pieces == [
        ("content", "Let me see.\n"),
        (0, "search", ARGUMENTS),
        (1, "stop", "{}"),
        ("content", "\nDone."),
    ]


@pytest.mark.parametrize("hold_calls", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_cut_in_two_gives_the_same(name: str, hold_calls: bool) -> None:
    text = TEXTS[name]
    whole = plain(fed(OutputParser(name, TOOLS, hold_calls=hold_calls), [text]))
    for place in range(len(text)):
        parser = OutputParser(name, TOOLS, hold_calls=hold_calls)
        assert plain(fed(parser, split(text, [place]))) == whole, text[:place]
    for size in (1, 2, 3, 5, 8, 13):
        parser = OutputParser(name, TOOLS, hold_calls=hold_calls)
        assert plain(fed(parser, split(text, range(0, len(text), size)))) == whole


@pytest.mark.parametrize("name", NAMES)
def test_every_end_of_the_text_gives_the_same_in_a_stream(name: str) -> None:
    """An output that max_tokens cuts off: what arrived of the arguments is delivered either way."""
    for end in range(len(TEXTS[name])):
        text = TEXTS[name][:end]
        whole = plain(fed(OutputParser(name, TOOLS), [text]))
        assert plain(fed(OutputParser(name, TOOLS), list(text))) == whole
        names = [piece[1] for piece in whole if isinstance(piece[0], int)]
        assert names == ["search", "stop"][: len(names)]


@given(OUTPUTS, PLACES, st.sampled_from(NAMES), st.booleans(), st.booleans())
@settings(max_examples=600, deadline=None)
@example("search(n=5, -", [], "function", False, True)
def test_any_text_in_any_parts_gives_the_same(
    text: str, places: list[int], name: str, hold_calls: bool, has_tools: bool
) -> None:
    tools = TOOLS if has_tools else []
    whole = plain(fed(OutputParser(name, tools, hold_calls=hold_calls), [text]))
    assert plain(fed(OutputParser(name, tools, hold_calls=hold_calls), split(text, places))) == whole
    assert plain(fed(OutputParser(name, tools, hold_calls=hold_calls), list(text))) == whole


@given(OUTPUTS, st.sampled_from(NAMES))
@settings(max_examples=600, deadline=None)
def test_content_and_calls_cover_the_text_in_order(text: str, name: str) -> None:
    """With calls held, all text is content or a call, but for white space and separators next to calls."""
    parser = OutputParser(name, TOOLS, hold_calls=True)
    content = [piece.text for piece in fed(parser, [text]) if isinstance(piece, ContentDelta)]
    calls = parser.tool_calls()
    rest, position = "", 0
    for call in calls:
        assert call.raw_text == text[call.start_pos : call.end_pos]
        assert position <= call.start_pos < call.end_pos
        rest += text[position : call.start_pos]
        position = call.end_pos
        if call.is_complete:
            assert json.loads(call.arguments_json) == call.arguments
    rest += text[position:]
    dropped = str.maketrans("", "", " \n,;" if calls else "")
    assert "".join(content).translate(dropped) == rest.translate(dropped)
    assert calls or "".join(content) == text


@pytest.mark.parametrize("name", NAMES)
def test_id_and_name_come_once_and_indices_rise_from_zero(name: str) -> None:
    parser = OutputParser(name, TOOLS)
    pieces = [piece for part in TEXTS[name] for piece in parser.feed(part)] + parser.finish()
    deltas = [piece for piece in pieces if isinstance(piece, ToolCallDelta)]
    assert [delta.index for delta in deltas] == sorted(delta.index for delta in deltas)
    first = [delta for delta in deltas if delta.id is not None]
    assert [(delta.index, delta.name) for delta in first] == [(0, "search"), (1, "stop")]
    assert len({delta.id for delta in first}) == 2
    assert [call.id for call in parser.tool_calls()] == [delta.id for delta in first]


@pytest.mark.parametrize("name", ["hermes", "json", "llama3", "mistral"])
def test_arguments_arrive_while_the_call_is_written(name: str) -> None:
    parser = OutputParser(name, TOOLS)
    cut = TEXTS[name].index("green")
    pieces = [piece for part in TEXTS[name][:cut] for piece in parser.feed(part)]
    assert "".join(p.arguments for p in pieces if isinstance(p, ToolCallDelta)) == '{"query": "tea, ('


def test_a_string_in_markup_arrives_while_it_is_written() -> None:
    parser = OutputParser("xml", TOOLS)
    parser.feed('<invoke name="search"><parameter name="query">"tea')
    assert plain(parser.feed(" and more</param")) == [(0, None, " and more")]
    assert parser.is_holding
    assert plain(parser.feed("eter>")) == [(0, None, '"')]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{}</tool_call>",
        "<tool_call>call search</tool_call>",
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {"n": 5}}</tool_call>',
        '<tool_call>{"name": "search", "arguments": [5]}</tool_call>',
        '<tool_call>{"name": "search", "name": "stop", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "search", "arguments": "no object"}</tool_call>',
        '<tool_call>{"name": "two words", "arguments": {}}</tool_call>',
        "<tool_call>",
        "  <tool_ca",
    ],
)
def test_what_is_no_call_stays_content(text: str) -> None:
    assert plain(fed(OutputParser("hermes", TOOLS), list(text))) == [("content", text)]


def test_a_malformed_call_is_content_if_calls_are_held() -> None:
    text = '<tool_call>{"name": "search", "arguments": {"n": five}}</tool_call>'
    assert plain(fed(OutputParser("hermes", TOOLS, hold_calls=True), list(text))) == [("content", text)]


def test_a_call_that_was_begun_ends_where_it_is_malformed() -> None:
    text = '<tool_call>{"name": "search", "arguments": {"n": five}}</tool_call>'
    parser = OutputParser("hermes", TOOLS)
    assert plain(fed(parser, list(text))) == [(0, "search", '{"n": '), ("content", "five}}</tool_call>")]
    assert not parser.tool_calls()[0].is_complete


def test_a_call_after_a_malformed_one_is_read() -> None:
    text = '<tool_call>{"name": <tool_call>{"name": "stop", "arguments": {}}</tool_call>'
    assert plain(fed(OutputParser("hermes", TOOLS), [text])) == [("content", '<tool_call>{"name": '), (0, "stop", "{}")]


def test_a_call_that_is_cut_off_keeps_its_partial_arguments() -> None:
    output = parse_output('<tool_call>{"name": "search", "arguments": {"query": "te', "hermes", TOOLS)
    (call,) = output.tool_calls
    assert (call.name, call.arguments_json, call.arguments, call.is_complete) == ("search", '{"query": "te', {}, False)
    assert output.content == ""


@pytest.mark.parametrize(
    ("arguments", "delivered"),
    [
        ('"{\\"n\\": 5}"', '{"n": 5}'),
        ("null", "{}"),
        ('""', "{}"),
        ('{ "n" :5 }', '{ "n" :5 }'),
    ],
)
def test_arguments_may_be_encoded_or_missing(arguments: str, delivered: str) -> None:
    text = f'<tool_call>{{"type": "function", "name": "search", "arguments": {arguments}}}</tool_call>'
    assert plain(fed(OutputParser("hermes", TOOLS), list(text))) == [(0, "search", delivered)]


def test_arguments_may_come_before_the_name_and_in_a_nested_function() -> None:
    text = '{"type": "function", "function": {"arguments": {"n": [1, {"a": 2}]}, "name": "search"}}'
    assert plain(fed(OutputParser("json", TOOLS), list(text))) == [(0, "search", '{"n": [1, {"a": 2}]}')]


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ada", "arguments": {}}',
        'The data: {"name": "Ada", "age": 36}.',
        '```json\n{"name": "Ada"}\n```',
        "```json\n[1, 2]\n```",
        '{"city": {"name": "Oslo"}}',
    ],
)
def test_json_that_names_no_tool_is_content(text: str) -> None:
    assert plain(fed(OutputParser("json", TOOLS), list(text))) == [("content", text)]


@pytest.mark.parametrize(
    "text",
    ["f(x) and print(1)", "research(n=5)", "a.search(n=5)", "search(query)", "search", "search(n=5", "Call stop."],
)
def test_prose_with_parentheses_is_no_call(text: str) -> None:
    content = [piece[1] for piece in plain(fed(OutputParser("function", TOOLS, hold_calls=True), list(text)))]
    assert content == [text]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("'a, b)', 5", {"query": "a, b)", "n": 5}),
        ("query='it\\'s', tags=[['a', ('b',)], {'c': None}]", {"query": "it's", "tags": [["a", ["b"]], {"c": None}]}),
        ('query="\\/ \\ud83d\\ude00", n=-5,', {"query": "/ \U0001f600", "n": -5}),
        ("query='\\d'", {"query": "\\d"}),
        ('n="7", tags=[true, False, null, -1.5]', {"n": 7, "tags": [True, False, None, -1.5]}),
        ("", {}),
    ],
)
def test_arguments_in_python_are_literals(arguments: str, expected: dict[str, object]) -> None:
    (call,) = parse_output(f"search({arguments})", "function", TOOLS).tool_calls
    assert call.arguments == expected


@pytest.mark.parametrize(
    "argument",
    ["n=f()", "n=a.b", "n=1+1", "n=f'{x}'", "n=b'x'", "n={1: 2}", "n={1}", "n=-'a'", "n=1e999", "n=1 n=2", "-" * 9999],
)
def test_nothing_but_literals_is_evaluated(argument: str) -> None:
    text = f"search({argument})"
    assert plain(fed(OutputParser("function", TOOLS, hold_calls=True), [text])) == [("content", text)]


def test_a_pythonic_list_needs_no_tools() -> None:
    text = "[weather.get(city='Oslo'), f()]"
    assert plain(fed(OutputParser("pythonic"), list(text))) == [(0, "weather.get", '{"city": "Oslo"}'), (1, "f", "{}")]


def test_mistral_ids_are_nine_characters_and_others_are_as_openai_writes_them() -> None:
    (call,) = parse_output("[TOOL_CALLS]stop[CALL_ID]abc[ARGS]{}", "mistral", TOOLS).tool_calls
    assert len(call.id) == 9
    assert call.id.isalnum()
    (call,) = parse_output("stop()", "function", TOOLS).tool_calls
    assert (call.id[:5], len(call.id)) == ("call_", 29)


def test_white_space_stays_where_there_is_text() -> None:
    call = '<tool_call>{"name": "stop"}</tool_call>'
    assert plain(fed(OutputParser("hermes", TOOLS), list(f"\n\n{call}\n{call}\n"))) == [
        (0, "stop", "{}"),
        (1, "stop", "{}"),
    ]
    assert plain(fed(OutputParser("hermes", TOOLS), list(f"\n\nHi {call}\n"))) == [
        ("content", "\n\nHi "),
        (0, "stop", "{}"),
    ]
    assert plain(fed(OutputParser("hermes", TOOLS), [" \n"])) == [("content", " \n")]


def test_text_is_held_only_while_it_may_begin_a_marker() -> None:
    parser = OutputParser("hermes", TOOLS)
    assert (plain(parser.feed("a <b> <tool")), parser.is_holding) == ([("content", "a <b> ")], True)
    assert (plain(parser.feed("s>")), parser.is_holding) == ([("content", "<tools>")], False)
    assert (plain(parser.feed("<tool_call>")), parser.is_holding) == ([], True)


def test_without_a_format_everything_is_content() -> None:
    assert plain(fed(OutputParser(), list(TEXTS["hermes"]))) == [("content", TEXTS["hermes"])]


def test_calls_in_the_reasoning_are_reasoning() -> None:
    text = f"<think>\nI could <tool_call>{{}}</tool_call>.\n</think>\n\n{TEXTS['hermes']}"
    for parts in ([text], list(text)):
        splitter = ReasoningSplitter(REASONING_FORMATS["qwen3"])
        pieces = plain(fed(OutputParser("hermes", TOOLS, reasoning=splitter), parts))
        assert pieces[0] == ("reasoning", "I could <tool_call>{}</tool_call>.")
        assert pieces[1:] == plain(fed(OutputParser("hermes", TOOLS), [TEXTS["hermes"]]))


def test_unknown_format_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="unknown tool call format 'yaml': choose one of function, hermes, json"):
        format_named("yaml")
    assert format_named("qwen") is FORMATS["hermes"]


HEADS = {
    "json": "```json\n",
    "hermes": "<tool_call>",
    "llama3": "<|python_tag|>",
    "mistral": "[TOOL_CALLS]",
    "xml": '<invoke name="search"><parameter name="tags">',
    "qwen3_coder": "<tool_call><function=search><parameter=tags>",
    "function": "search(tags=",
    "pythonic": "[search(tags=",
}
CALL = '{"name": "search", "arguments": '
HOSTILE: dict[str, Callable[[str], tuple[str, str]]] = {  # a head, and what follows it again and again
    "unclosed": lambda head: ("", head),
    "unfinished markers": lambda head: ("", head[:-1]),
    "braces": lambda head: (head, "{"),
    "objects in objects": lambda head: (head + CALL, '{"a":'),
    "lists in lists": lambda head: (head + CALL, "["),
    "many numbers": lambda head: (head + CALL + '{"a":[', "1,"),
    "many lists": lambda head: (head + CALL + '{"a":[', "[[[[[]]]]],"),
    "many objects": lambda head: (head + CALL + '{"a":[', '[{"a":[{"a":1}]}],'),
    "values five deep": lambda head: (head + CALL + '{"a":[', '{"k":{"k":{"k":{"k":{"b":1}}}},"l":[1,[2]]},'),
    "values ten deep": lambda head: (head + CALL + '{"a":[', '{"k":[' * 5 + '{"b":1}' + "]}" * 5 + ","),
    "many members": lambda head: (head + '{"name":"search"', ',"a":1'),
    "many calls": lambda head: ("", head + CALL + "{}}"),
    "names": lambda head: ("", '{"name":"'),
    "literals": lambda head: (head + "[", "'',"),
    "arguments": lambda head: ("[search(", "a=1,"),
    "signs": lambda head: (head, "-"),
    "fences": lambda head: ("", "```"),
    "elements": lambda head: ('<invoke name="search">', '<parameter name="n">5</parameter>'),
    "old elements": lambda head: ("", "<invoke><tool_name>search</tool_name><parameters><q1>1</q1>"),
    "white space": lambda head: (head, " "),
    "prose": lambda head: ("", "Some (prose) with [all] kinds of {marks}, <b>bold</b>. "),
}


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("name", NAMES)
def test_a_megabyte_of_hostile_text_is_read_in_linear_time(name: str, attack: str) -> None:
    """About 0.1 s on a free core, 0.5 s at most; the bound leaves room for a crowded machine."""
    head, unit = HOSTILE[attack](HEADS[name])
    text = head + unit * (1_000_000 // len(unit))
    start = time.process_time()
    parse_output(text, name, TOOLS)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("name", NAMES)
def test_a_stream_of_hostile_text_is_read_in_linear_time(name: str, attack: str) -> None:
    head, unit = HOSTILE[attack](HEADS[name])
    text = head + unit * (40_000 // len(unit))
    start = time.process_time()
    fed(OutputParser(name, TOOLS), split(text, range(0, len(text), 4)))
    assert time.process_time() - start < 5
