"""Calls as Python: `search(query="a", n=[1, 2])`, in the text (function) or in a list (pythonic, Llama 3.2 and 4).

Arguments must be literals. Each is delivered when it is complete. Nothing is evaluated but literals.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace

from penstock.tools.coercion import coerced, finite
from penstock.tools.cursor import Malformed, Marker, Reading, beginnings
from penstock.tools.formats.block import Block, Format

_MAX_DEPTH = 64
_MAX_NAME = 128
_IDENTIFIER = re.compile(r"[\w.-]*+", re.ASCII)
_KEYWORD = re.compile(r"\s*(\w+)\s*=(?!=)\s*", re.ASCII)
_PLAIN = re.compile(r"[^\[\]{}(),'\"#\\]*+")
_BODIES = {"'": re.compile(r"(?:[^\\\n']|\\.)*+", re.DOTALL), '"': re.compile(r'(?:[^\\\n"]|\\.)*+', re.DOTALL)}
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_PYTHON_ESCAPES = frozenset("\\'\"abfnrtvx01234567NuU\n")
_CLOSING = {"]": "[", "}": "{", ")": "("}
_PUNCTUATION = "[]{}(),#\\"
_STEP_COST = 8  # of a bracket, a comma or a string inside a list
_CONSTANTS = {"true": True, "false": False, "null": None}


class _Argument:
    """The text of one argument, up to the comma or parenthesis behind it."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._stack: list[str] = []
        self._fragments: list[str] = []

    def read(self) -> Reading[str]:
        cursor = self._block.cursor
        while True:
            self._take(_PLAIN)
            character = yield from cursor.peek()
            if character in "'\"":
                yield from self._read_string(character)
            elif not self._stack and character in ",)":
                return "".join(self._fragments)
            elif character in _PUNCTUATION:
                self._nest(character)

    def _nest(self, character: str) -> None:
        """Read a bracket or a comma inside one."""
        if character in "[{(" and len(self._stack) < _MAX_DEPTH:
            self._stack.append(character)
        elif character in "]})" and self._stack[-1:] == [_CLOSING[character]]:
            self._stack.pop()
        elif character != ",":
            raise Malformed
        self._block.cursor.pos += 1
        self._block.calls.charge(_STEP_COST)
        self._fragments.append(character)

    def _read_string(self, quote: str) -> Reading[None]:
        cursor = self._block.cursor
        cursor.pos += 1
        self._block.calls.charge(_STEP_COST)
        self._fragments.append(quote)
        while True:
            self._take(_BODIES[quote])
            character = yield from cursor.peek()
            if character == quote:
                break
            if character == "\n":
                raise Malformed
            if character == "\\" and cursor.pos + 1 == len(cursor.text):
                yield from cursor.more()  # the rest of the escape
        cursor.pos += 1
        self._fragments.append(quote)

    def _take(self, pattern: re.Pattern[str]) -> None:
        cursor = self._block.cursor
        match = pattern.match(cursor.text, cursor.pos)
        assert match
        if self._stack or pattern is _PLAIN:
            self._block.calls.charge(len(match[0]))  # a string outside a list is quick to evaluate
        self._fragments.append(match[0])
        cursor.pos = match.end()


def _read_call(block: Block, name: str) -> Reading[None]:
    """The arguments of a call, and the parenthesis that ends it. The call is announced with its first argument."""
    cursor, calls = block.cursor, block.calls
    keys: list[str] = []
    yield from cursor.spaces()
    is_last = (yield from cursor.choice(")")) is not None
    while not is_last:
        text = yield from _Argument(block).read()
        key, value = _keyword(block, name, text, keys)
        if not keys:
            calls.begin(name)
        keys.append(key)
        calls.member(key, value)
        is_last = (yield from cursor.literal(",", ")")) == ")"
        if not is_last:
            yield from cursor.spaces()
            is_last = (yield from cursor.choice(")")) is not None
    if not keys:
        calls.begin(name)
    calls.end_members()
    calls.end()


def _keyword(block: Block, function: str, text: str, keys: list[str]) -> tuple[str, object]:
    """The name and the value of an argument. One without a name takes the place that the tool's schema gives it."""
    match = _KEYWORD.match(text)
    properties = list(block.tools[function].properties) if function in block.tools else []
    if match is None and len(keys) >= len(properties):
        raise Malformed
    key = match[1] if match else properties[len(keys)]
    if key in keys:
        raise Malformed
    value = _literal_value(text[match.end() if match else 0 :].strip())
    types = block.types_of(function, key)
    return key, coerced(value, types) if isinstance(value, str) and types else value


def _literal_value(text: str) -> object:
    """The value of a literal, of JSON or else of Python."""
    try:
        return json.loads(text, parse_float=finite, parse_constant=finite)
    except ValueError:
        pass
    try:
        return _value(ast.parse(_ESCAPE.sub(_known_escape, text), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise Malformed from None


def _known_escape(match: re.Match[str]) -> str:
    """The escape, its backslash doubled if Python does not know it: that would give a warning."""
    return match[0] if match[1] in _PYTHON_ESCAPES else "\\" + match[0]


def _value(node: ast.expr) -> object:
    """The value of a syntax tree of literals that JSON can hold."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return finite(str(node.value)) if isinstance(node.value, float) else node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {_key(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        number = _value(node.operand)
        if isinstance(number, int | float) and not isinstance(number, bool):
            return -number if isinstance(node.op, ast.USub) else number
    raise Malformed


def _key(node: ast.expr | None) -> str:
    key = _value(node) if node is not None else None
    if not isinstance(key, str):
        raise Malformed
    return key


def _read_function(block: Block) -> Reading[None]:
    name = block.opening[:-1].rstrip()
    yield from _read_call(replace(block, is_marked=False), name)


def _read_pythonic(block: Block) -> Reading[None]:
    block = replace(block, is_marked=False)
    cursor = block.cursor
    while True:
        yield from cursor.spaces()
        name = block.checked_name((yield from cursor.run(_IDENTIFIER, _MAX_NAME)))
        yield from cursor.spaces()
        yield from cursor.literal("(")
        yield from _read_call(block, name)
        yield from cursor.spaces()
        if (yield from cursor.literal(",", "]")) == "]":
            block.calls.extend()
            return
        yield from cursor.spaces()
        block.calls.starts_here()


def _function_marker(names: tuple[str, ...]) -> Marker:
    """A known name and a parenthesis. Without tools nothing is a call."""
    if not names:
        return Marker("(?!)", "(?!)", 1)
    alternatives = "|".join(map(re.escape, names))
    partial = rf"(?<![\w.])(?:(?:{alternatives})\s{{0,4}}|{'|'.join(map(beginnings, names))})"
    return Marker(rf"(?<![\w.])(?:{alternatives})\s{{0,4}}\(", partial, max(map(len, names)) + 5)


def _pythonic_marker(names: tuple[str, ...]) -> Marker:
    """A bracket before a known name, or before any if there are no tools, and a parenthesis."""
    name = "|".join(map(re.escape, names)) or r"[A-Za-z_][\w.-]{0,127}"
    partial = "|".join(map(beginnings, names))
    partial = rf"\[\s{{0,8}}(?:(?:{name})\s{{0,4}}|{partial})?"
    return Marker(rf"\[(?=\s{{0,8}}(?:{name})\s{{0,4}}\()", partial, max(map(len, names), default=128) + 14)


FUNCTION = Format("function", _function_marker, _read_function)
PYTHONIC = Format("pythonic", _pythonic_marker, _read_pythonic)
