"""Reads JSON text as it arrives, and finds where a value ends or stops being JSON. Builds no objects.

Strict: what is accepted here is accepted by `json.loads`. Linear in the length of the text; nesting is bounded, so that
no reader of the text recurses too deeply. Runs of shallow members are matched by one regular expression each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache

from penstock.tools.cursor import Cursor, EndOfText, Malformed, Reading

MAX_DEPTH = 128
_MAX_SCALAR = 400  # characters; longer than any number that `_NUMBER` matches
_WS = r"[ \t\n\r]*+"
_NUMBER = r"-?+(?:0|[1-9]\d{0,120}+)(?:\.\d{1,120}+)?+(?:[eE][+-]?+\d{1,4}+)?+"
_STRING_BODY = r'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+'
_SCALAR = rf"(?:{_NUMBER}(?![\w.+-])|(?:true|false|null)(?!\w)|\"{_STRING_BODY}\")"
_BULK_DEPTH = 5  # each level doubles the pattern


def _nested(value: str) -> str:
    """A pattern of a value one level deeper."""
    items = rf"(?:{value}{_WS}(?:,{_WS}(?!\])|(?=\])))*+"
    key = rf"\"{_STRING_BODY}\"{_WS}:{_WS}"
    members = rf"(?:{key}{value}{_WS}(?:,{_WS}(?!\}})|(?=\}})))*+"
    array, mapping = rf"\[{_WS}{items}\]", rf"\{{{_WS}{members}\}}"
    return rf"(?>{_SCALAR}|{array}|{mapping})"


_SPACE = re.compile(_WS)
_OPENINGS = re.compile(rf"(?:\[{_WS}|\{{{_WS}\"{_STRING_BODY}\"{_WS}:{_WS}){{0,128}}+")
_CLOSINGS = re.compile(rf"(?:[\]}}]{_WS}){{1,128}}+(?:,{_WS})?+")
_BETWEEN_BRACKETS = re.compile(rf"\"{_STRING_BODY}\"|[\s:,]++")
_BODY = re.compile(_STRING_BODY)
_PARTIAL_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_SCALAR_RUN = re.compile(r"[-+.\w]*+", re.ASCII)
_WORD = re.compile(rf"(?:{_NUMBER}|true|false|null)", re.ASCII)


@cache
def _shallow_runs() -> dict[str, re.Pattern[str]]:
    """Patterns of shallow items and members, each with its comma, by the bracket around them. Compiled on first use."""
    value = _SCALAR
    for _ in range(_BULK_DEPTH):
        value = _nested(value)
    return {
        "[": re.compile(rf"(?:{_WS}{value}{_WS},)*+", re.ASCII),
        "{": re.compile(rf"(?:{_WS}\"{_STRING_BODY}\"{_WS}:{_WS}{value}{_WS},)*+", re.ASCII),
    }


# What may come next.
_VALUE, _FIRST_ITEM, _KEY, _FIRST_KEY, _COLON, _COMMA = range(6)
_CLOSING = {"]": "[", "}": "{"}
_OPENING_OF = str.maketrans("]}", "[{")
_SHUT = {"[": (_FIRST_ITEM, _COMMA), "{": (_FIRST_KEY, _COMMA)}


class JsonScanner:
    """The state of reading one JSON value."""

    def __init__(self) -> None:
        self.ended = False
        self._stack = ""  # the brackets that are open
        self._next = _VALUE
        self._in_string = False
        self._is_key = False

    def scan(self, text: str, pos: int, closed: bool) -> int:
        """Read from `pos` on and return where reading stopped: the end of the value, or where more text is needed.

        Raises `Malformed` where the text stops being JSON. `closed` means that no more text will come.
        """
        while not self.ended and pos < len(text):
            end = self._string(text, pos) if self._in_string else self._token(text, pos, closed)
            if end == pos:
                break
            pos = end
        return pos

    def _string(self, text: str, pos: int) -> int:
        match = _BODY.match(text, pos)
        assert match
        end = match.end()
        if end == len(text):
            return end
        if text[end] == '"':
            self._in_string = False
            self._next = _COLON if self._is_key else _COMMA
            self.ended = not self._stack
            return end + 1
        if not _PARTIAL_ESCAPE.match(text, end):
            raise _MalformedAt(end)
        return end

    def _token(self, text: str, pos: int, closed: bool) -> int:
        space = _SPACE.match(text, pos)
        assert space
        if space.end() == len(text):
            return len(text)
        pos = space.end()
        for read_run in (self._closings,) if text[pos] in "]}" else (self._shallow, self._openings):
            if (end := read_run(text, pos)) > pos:
                return end
        return self._punctuation(text[pos], pos) or self._scalar(text, pos, closed)

    def _shallow(self, text: str, pos: int) -> int:
        """Read a run of shallow items or members, each with its comma."""
        if not self._stack or len(self._stack) > MAX_DEPTH - _BULK_DEPTH or self._next in (_COLON, _COMMA):
            return pos
        is_array = self._stack[-1] == "["
        if self._next == _VALUE and not is_array:
            return pos  # the value of a key
        match = _shallow_runs()[self._stack[-1]].match(text, pos)
        assert match
        if match.end() > pos:
            self._next = _VALUE if is_array else _KEY
        return match.end()

    def _openings(self, text: str, pos: int) -> int:
        """Read a run of brackets that open, with the keys between them."""
        if self._next not in (_VALUE, _FIRST_ITEM) or text[pos] not in "[{":
            return pos
        match = _OPENINGS.match(text, pos)
        assert match
        brackets = _BETWEEN_BRACKETS.sub("", match[0])
        if not brackets or len(self._stack) + len(brackets) > MAX_DEPTH:
            return pos
        self._stack += brackets
        self._next = _FIRST_ITEM if brackets[-1] == "[" else _VALUE
        return match.end()

    def _closings(self, text: str, pos: int) -> int:
        """Read a run of brackets that close, with the comma behind them."""
        if not self._stack or self._next not in _SHUT[self._stack[-1]]:
            return pos
        match = _CLOSINGS.match(text, pos)
        assert match
        brackets = _BETWEEN_BRACKETS.sub("", match[0])
        depth = len(self._stack) - len(brackets)
        if depth <= 0 or brackets[::-1].translate(_OPENING_OF) != self._stack[depth:]:
            return pos
        self._stack = self._stack[:depth]
        has_comma = match[0].rstrip().endswith(",")
        self._next = _COMMA if not has_comma else _VALUE if self._stack[-1] == "[" else _KEY
        return match.end()

    def _punctuation(self, character: str, pos: int) -> int:
        """Read one character of punctuation, or return 0 if a number or a word begins here."""
        expected = self._next
        if character == '"' and expected not in (_COLON, _COMMA):
            self._in_string, self._is_key = True, expected in (_KEY, _FIRST_KEY)
        elif character in "[{" and expected in (_VALUE, _FIRST_ITEM) and len(self._stack) < MAX_DEPTH:
            self._stack += character
            self._next = _SHUT[character][0]
        elif character in "]}" and self._stack[-1:] == _CLOSING[character] and expected in _SHUT[self._stack[-1]]:
            self._stack = self._stack[:-1]
            self._next = _COMMA
            self.ended = not self._stack
        elif character == "," and expected == _COMMA:
            self._next = _VALUE if self._stack[-1] == "[" else _KEY
        elif character == ":" and expected == _COLON:
            self._next = _VALUE
        elif expected in (_VALUE, _FIRST_ITEM) and character not in '"[]{},:':
            return 0
        else:
            raise _MalformedAt(pos)
        return pos + 1

    def _scalar(self, text: str, pos: int, closed: bool) -> int:
        match = _SCALAR_RUN.match(text, pos)
        assert match
        end = match.end()
        if end - pos <= _MAX_SCALAR and end == len(text) and (self._stack or not closed):
            return pos  # it may go on; inside a list or an object, more must follow
        if not _WORD.fullmatch(text, pos, end):
            raise _MalformedAt(pos)
        self._next = _COMMA
        self.ended = not self._stack
        return end


class _MalformedAt(Malformed):
    """The text up to `pos` is JSON."""

    def __init__(self, pos: int) -> None:
        self.pos = pos


def json_value(cursor: Cursor, deliver: Callable[[str], None]) -> Reading[None]:
    """Read one JSON value and deliver its text, piece by piece; all of it if the text ends inside the value."""
    scanner = JsonScanner()
    while True:
        malformed: _MalformedAt | None = None
        try:
            end = scanner.scan(cursor.text, cursor.pos, cursor.closed)
        except _MalformedAt as error:
            malformed, end = error, error.pos
        deliver(cursor.text[cursor.pos : end])
        cursor.pos = end
        if malformed:
            raise malformed
        if scanner.ended:
            return
        if cursor.closed:
            deliver(cursor.rest())
        yield from cursor.more()


def json_string(cursor: Cursor) -> Reading[str]:
    """Read a JSON string and return what it stands for."""
    if (yield from cursor.peek()) != '"':
        raise Malformed
    fragments: list[str] = []
    yield from json_value(cursor, fragments.append)
    return str(json.loads("".join(fragments)))


def is_json_object(text: str) -> bool:
    """Whether a whole text is a JSON object that `json_value` accepts."""
    cursor = Cursor()
    cursor.feed(text.strip(" \t\n\r"))
    cursor.closed = True
    try:
        for _ in json_value(cursor, _ignore):
            return False
    except (Malformed, EndOfText):
        return False
    return text.lstrip().startswith("{") and not cursor.has_unread


def _ignore(text: str) -> None:
    """Deliver nowhere."""
