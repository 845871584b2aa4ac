"""Calls as JSON objects: {"name": ..., "arguments": {...}}, bare, in a fence, or behind a marker.

The formats json, hermes (Qwen 2.5 and 3), llama3 and mistral. The arguments are delivered as the model wrote them.
"""

from __future__ import annotations

import re
from dataclasses import replace

from penstock.tools.cursor import Malformed, Marker, Reading
from penstock.tools.formats.block import Block, Format, literal_markers
from penstock.tools.json_text import is_json_object, json_string, json_value
from penstock.tools.pieces import random_id

_NAME_KEYS = frozenset({"name", "tool", "tool_name", "function"})
_ARGUMENT_KEYS = frozenset({"arguments", "args", "parameters", "input"})
_FIRST_KEYS = ("name", "tool", "tool_name", "function", "arguments", "args", "parameters", "input", "type", "id")
_MAX_MEMBERS = 16

_HEAD = rf'\{{\s{{0,32}}"(?:{"|".join(_FIRST_KEYS)})"'
_PARTIAL_HEAD = r'\{(?:\s{0,32}|\s{0,32}"\w{0,9})'
_LIST_HEAD = rf"(?=(?:\[\s{{0,32}})?{_HEAD})"
_PARTIAL_LIST_HEAD = rf"(?:\[(?:\s{{0,32}}|\s{{0,32}}{_PARTIAL_HEAD})|{_PARTIAL_HEAD})"
_FENCE = r"```[a-z_]{0,16}\s{0,32}"
_WINDOW = 160

_FENCED = Marker(
    rf"{_FENCE}{_LIST_HEAD}|{_LIST_HEAD}", rf"`{{1,2}}|{_FENCE}{_PARTIAL_LIST_HEAD}?|{_PARTIAL_LIST_HEAD}", _WINDOW
)
_PYTHON_TAG = "<|python_tag|>"
_PYTHON_TAG_OR_BARE = Marker(
    rf"{re.escape(_PYTHON_TAG)}|{_LIST_HEAD}", rf"{Marker.literals(_PYTHON_TAG).partial}|{_PARTIAL_LIST_HEAD}", _WINDOW
)
_MISTRAL_NAME = re.compile(r"[\w.:/-]*+", re.ASCII)
_MISTRAL_ID = re.compile(r"[\w-]*+", re.ASCII)


class _Members:
    """What is read of one call so far."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._name: str | None = None
        self._early: list[str] = []  # arguments that came before the name
        self._has_arguments = False

    def set_name(self, name: str) -> None:
        """Announce the call, unless its arguments are still to come."""
        if self._name is not None:
            raise Malformed
        self._name = self._block.checked_name(name)
        if self._has_arguments:
            self._announce()

    def start_arguments(self) -> None:
        """The arguments come next."""
        if self._has_arguments:
            raise Malformed
        self._has_arguments = True
        if self._name is not None:
            self._announce()

    def deliver(self, fragment: str) -> None:
        """Deliver a fragment of the arguments, or keep it until the name is known."""
        if self._name is None:
            self._early.append(fragment)
        else:
            self._block.calls.arguments(fragment)

    def end(self) -> None:
        """The object ends. Raises `Malformed` if it is not a call."""
        if self._name is None:
            raise Malformed
        if not self._has_arguments:
            if not self._block.is_marked and not self._block.tools:
                raise Malformed  # {"name": "Ada"} is more likely data
            self.start_arguments()
            self.deliver("{}")
        self._block.calls.end()

    def _announce(self) -> None:
        assert self._name is not None
        self._block.calls.begin(self._name)
        self._block.calls.arguments("".join(self._early))


def read_calls(block: Block) -> Reading[None]:
    """A call, a list of calls, or several with commas, semicolons or white space between them."""
    cursor = block.cursor
    yield from cursor.spaces()
    is_list = (yield from cursor.choice("[")) is not None
    while True:
        yield from cursor.spaces()
        yield from _read_call(block)
        yield from cursor.spaces()
        separator = yield from cursor.choice(",", ";", "]") if is_list else cursor.choice(",", ";")
        if separator == "]":
            block.calls.extend()
            return
        if separator:
            yield from cursor.spaces()
        if (yield from cursor.peek()) != "{":
            return
        block.calls.starts_here()


def _read_call(block: Block) -> Reading[None]:
    members = _Members(block)
    yield from _read_members(block, members)
    members.end()


def _read_members(block: Block, members: _Members) -> Reading[None]:
    cursor = block.cursor
    yield from cursor.literal("{")
    for _ in range(_MAX_MEMBERS):
        yield from cursor.spaces()
        key = yield from json_string(cursor)
        yield from cursor.spaces()
        yield from cursor.literal(":")
        yield from cursor.spaces()
        yield from _read_member(block, members, key)
        yield from cursor.spaces()
        if (yield from cursor.literal(",", "}")) == "}":
            return
    raise Malformed


def _read_member(block: Block, members: _Members, key: str) -> Reading[None]:
    character = yield from block.cursor.peek()
    if key == "function" and character == "{":
        yield from _read_members(block, members)
    elif key in _NAME_KEYS:
        members.set_name((yield from json_string(block.cursor)))
    elif key in _ARGUMENT_KEYS and character == "{":
        members.start_arguments()
        yield from json_value(block.cursor, members.deliver)
    elif key in _ARGUMENT_KEYS:
        text = yield from _encoded_arguments(block)
        members.start_arguments()
        members.deliver(text)
    else:
        yield from json_value(block.cursor, _drop)


def _encoded_arguments(block: Block) -> Reading[str]:
    """Arguments that are not an object: JSON in a string, or null."""
    if (yield from block.cursor.choice("null")):
        return "{}"
    text = (yield from json_string(block.cursor)).strip() or "{}"
    if not is_json_object(text):
        raise Malformed
    return text


def _drop(text: str) -> None:
    """A member that does not matter, such as "type" or "id"."""


def _read_json(block: Block) -> Reading[None]:
    is_fenced = block.opening.startswith("```")
    yield from read_calls(replace(block, is_marked=False))
    if is_fenced and (yield from block.cursor.closing("```")):
        block.calls.extend()


def _read_hermes(block: Block) -> Reading[None]:
    yield from read_calls(block)
    if (yield from block.cursor.closing("</tool_call>")):
        block.calls.extend()


def _read_llama3(block: Block) -> Reading[None]:
    yield from read_calls(replace(block, is_marked=bool(block.opening)))


def _read_mistral(block: Block) -> Reading[None]:
    """[TOOL_CALLS] with a list of calls, or name{...}, name[ARGS]{...} and name[CALL_ID]id[ARGS]{...}."""
    cursor = block.cursor
    yield from cursor.spaces()
    if (yield from cursor.peek()) in "[{":
        yield from read_calls(block)
        return
    name = block.checked_name((yield from cursor.run(_MISTRAL_NAME, 128)))
    if (yield from cursor.choice("[CALL_ID]", "[ARGS]")) == "[CALL_ID]":
        yield from cursor.run(_MISTRAL_ID, 64)
        yield from cursor.literal("[ARGS]")
    yield from cursor.spaces()
    if (yield from cursor.peek()) != "{":
        raise Malformed
    block.calls.begin(name)
    yield from json_value(cursor, block.calls.arguments)
    block.calls.end()


def _nine_characters() -> str:
    """Mistral's templates refuse other ids."""
    return random_id("", 9)


JSON = Format("json", lambda names: _FENCED, _read_json)
HERMES = Format("hermes", literal_markers("<tool_call>"), _read_hermes)
LLAMA3 = Format("llama3", lambda names: _PYTHON_TAG_OR_BARE, _read_llama3, (_PYTHON_TAG,))
MISTRAL = Format(
    "mistral", literal_markers("[TOOL_CALLS]"), _read_mistral, ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), _nine_characters
)
