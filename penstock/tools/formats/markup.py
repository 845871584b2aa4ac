"""Calls as markup with an element for each argument. The formats xml (Anthropic, both styles) and qwen3_coder.

Values are plain text. Those whose schema says string are delivered as they arrive, others when they can be converted.
"""

from __future__ import annotations

import re

from penstock.tools.coercion import coerced, json_text
from penstock.tools.cursor import Marker, Reading
from penstock.tools.formats.block import Block, Format, literal_markers

_NAME = re.compile(r"[^\s<>\"]*+")
_MAX_NAME = 128
_PATTERN_COST = 512  # of compiling a marker, in characters of Python literals
_PARAMETER_END = Marker.literals("</parameter>")
# The template puts every value on lines of its own.
_LINES_END = Marker.literals("\n</parameter>", "</parameter>")


def _read_xml(block: Block) -> Reading[None]:
    """<function_calls><invoke name="f"><parameter name="a">1</parameter></invoke></function_calls>, and as it was."""
    if block.opening.startswith("<invoke"):
        yield from _read_invoke(block, block.opening)
        return
    num_calls = block.calls.num_calls
    while True:
        yield from block.cursor.spaces()
        opening = yield from block.cursor.literal('<invoke name="', "<invoke>", "</function_calls>")
        if opening == "</function_calls>":
            if block.calls.num_calls > num_calls:
                block.calls.extend()
            return
        yield from _read_invoke(block, opening)
        yield from block.cursor.spaces()
        block.calls.starts_here()


def _read_invoke(block: Block, opening: str) -> Reading[None]:
    if opening == "<invoke>":
        yield from _read_old_invoke(block)
    else:
        function = yield from _name(block, '">')
        block.calls.begin(block.checked_name(function))
        while (yield from _next_element(block, '<parameter name="', "</invoke>")):
            argument = yield from _name(block, '">')
            yield from _read_value(block, function, argument, _PARAMETER_END)
        block.calls.end_members()
    block.calls.end()


def _read_old_invoke(block: Block) -> Reading[None]:
    """<tool_name>f</tool_name><parameters><a>1</a></parameters></invoke>"""
    cursor = block.cursor
    yield from cursor.spaces()
    yield from cursor.literal("<tool_name>")
    function = yield from _name(block, "</tool_name>")
    block.calls.begin(block.checked_name(function))
    if (yield from _next_element(block, "<parameters>", "</invoke>")):
        while not (yield from _next_element(block, "</parameters>", "<")):
            argument = yield from _name(block, ">")
            block.calls.charge(_PATTERN_COST)
            yield from _read_value(block, function, argument, Marker.literals(f"</{argument}>"))
        yield from _next_element(block, "</invoke>")
    block.calls.end_members()


def _read_qwen3_coder(block: Block) -> Reading[None]:
    """<tool_call><function=f><parameter=a>1</parameter></function></tool_call>, with line breaks between."""
    cursor = block.cursor
    if block.opening == "<tool_call>":
        yield from cursor.spaces()
        yield from cursor.literal("<function=")
    function = yield from _name(block, ">")
    block.calls.begin(block.checked_name(function))
    while (yield from _next_element(block, "<parameter=", "</function>")):
        argument = yield from _name(block, ">")
        yield from cursor.choice("\n")
        yield from _read_value(block, function, argument, _LINES_END)
    block.calls.end_members()
    block.calls.end()
    if (yield from cursor.closing("</tool_call>")):
        block.calls.extend()


def _next_element(block: Block, first: str, *others: str) -> Reading[bool]:
    """Read one of the tags, and say whether it is the first one."""
    yield from block.cursor.spaces()
    return (yield from block.cursor.literal(first, *others)) == first


def _name(block: Block, end: str) -> Reading[str]:
    name = yield from block.cursor.run(_NAME, _MAX_NAME)
    yield from block.cursor.literal(end)
    return name


def _read_value(block: Block, function: str, argument: str, end: Marker) -> Reading[None]:
    types = block.types_of(function, argument)
    if types == {"string"}:
        yield from _read_string(block, argument, end)
        return
    fragments = []
    marker = None
    while marker is None:
        text, marker = yield from block.cursor.until(end)
        fragments.append(text)
    block.calls.member(argument, coerced("".join(fragments), types))


def _read_string(block: Block, argument: str, end: Marker) -> Reading[None]:
    block.calls.member_key(argument)
    block.calls.arguments('"')
    marker = None
    while marker is None:
        text, marker = yield from block.cursor.until(end)
        block.calls.arguments(json_text(text)[1:-1])
    block.calls.arguments('"')


XML = Format("xml", literal_markers("<function_calls>", '<invoke name="', "<invoke>"), _read_xml)
QWEN3_CODER = Format("qwen3_coder", literal_markers("<tool_call>", "<function="), _read_qwen3_coder)
