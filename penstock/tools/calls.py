"""Collects what a parser recognizes: content, calls with their arguments, and where in the text they were.

With `hold_calls` the deltas of a call are held until it is complete. A call that turns out malformed is then content;
otherwise it ends where it became malformed, because its beginning was delivered.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.tools.coercion import json_text
from penstock.tools.cursor import Cursor, Malformed
from penstock.tools.pieces import ContentDelta, Piece, ToolCall, ToolCallDelta, joined

MAX_CALLS = 1024
_MAX_WORK = 1 << 17  # of one text, in characters of Python literals
_MEMBER_COST = 32


@dataclass(slots=True)
class _Call:
    """A call that was announced."""

    name: str
    id: str
    start: int
    end: int = 0
    is_complete: bool = False
    fragments: list[str] = field(default_factory=list)


class CallCollector:
    """Where the readers of the formats deliver what they read."""

    def __init__(self, cursor: Cursor, new_id: Callable[[], str], hold_calls: bool) -> None:
        self._cursor = cursor
        self._new_id = new_id
        self._hold_calls = hold_calls
        self._calls: list[_Call] = []
        self._open: _Call | None = None
        self._pieces: list[Piece] = []
        self._held: list[ToolCallDelta] = []
        self._spaces: list[str] = []  # white space that is dropped if only calls or the text's ends surround it
        self._at_edge = True
        self._opening = ""  # was read before the cursor's mark
        self._start = 0
        self._work_left = _MAX_WORK

    @property
    def num_calls(self) -> int:
        """The number of calls announced so far."""
        return len(self._calls)

    def content(self, text: str) -> None:
        """Deliver text that belongs to no call."""
        if not text:
            return
        if self._at_edge and text.isspace():
            self._spaces.append(text)
            return
        self._pieces.append(ContentDelta("".join(self._spaces) + text))
        self._spaces = []
        self._at_edge = False

    def start(self, opening: str = "") -> None:
        """A block of calls, or the next call in it, may begin here: keep the text from here on, and `opening`."""
        self._cursor.mark()
        self._opening = opening
        self._start = self._cursor.position - len(opening)

    def starts_here(self) -> None:
        """The next call begins here: what was read since `start` only separates it from the last one."""
        self._start = self._cursor.position

    def begin(self, name: str) -> None:
        """Announce a call, which began at the last `start` or `starts_here`."""
        if len(self._calls) >= MAX_CALLS:
            raise Malformed
        call = _Call(name, self._new_id(), self._start)
        self._open = call
        self._deliver(ToolCallDelta(len(self._calls), "", call.id, name))
        self._calls.append(call)
        if not self._hold_calls:
            self._spaces, self._opening = [], ""
            self._cursor.unmark()

    def arguments(self, fragment: str) -> None:
        """Deliver JSON text of the open call's arguments."""
        assert self._open is not None
        if fragment:
            self._open.fragments.append(fragment)
            self._deliver(ToolCallDelta(len(self._calls) - 1, fragment))

    def member(self, key: str, value: object) -> None:
        """Deliver one argument of the open call."""
        self.member_key(key)
        self.arguments(json_text(value))

    def member_key(self, key: str) -> None:
        """Deliver the name of one argument; its value follows."""
        assert self._open is not None
        self.charge(_MEMBER_COST)
        self.arguments(f"{', ' if self._open.fragments else '{'}{json_text(key)}: ")

    def end_members(self) -> None:
        """Deliver the end of arguments that were delivered by member."""
        assert self._open is not None
        self.arguments("}" if self._open.fragments else "{}")

    def end(self) -> None:
        """The open call is complete."""
        assert self._open is not None
        self._open.is_complete = True
        self._close()
        self.start()

    def extend(self) -> None:
        """The last call, which is complete, ends here: its closing marker was read."""
        self._calls[-1].end = self._cursor.position
        self.start()

    def reject(self) -> None:
        """The text since the last `start` is malformed: it is content, except for what was delivered of a call."""
        if self._open is not None and self._hold_calls:
            self._held = []
            self._calls.pop()
            self._open = None
        elif self._open is not None:
            self._close()
        self.content(self._opening + self._cursor.marked())
        self._opening = ""
        self._cursor.unmark()

    def cut(self) -> None:
        """The text ends: an open call is delivered as far as it is known, other text is content."""
        is_marked = self._cursor.is_marked
        rest = self._cursor.rest()
        if self._open is not None:
            self._close()
            self._opening = ""
            self._cursor.unmark()
        elif not is_marked:
            self.content(rest)
        self.reject()
        if not self._calls and self._spaces:
            self._pieces.append(ContentDelta("".join(self._spaces)))
        self._spaces = []

    def charge(self, work: int) -> None:
        """Bound what is slow: evaluating Python literals, and arguments one by one. Raises `Malformed` beyond that."""
        self._work_left -= work
        if self._work_left < 0:
            raise Malformed

    def take(self) -> list[Piece]:
        """What was delivered since the last time."""
        pieces, self._pieces = self._pieces, []
        return joined(pieces)

    def tool_calls(self, text: str) -> tuple[ToolCall, ...]:
        """Every call; `text` is the whole text that was parsed."""
        return tuple(_tool_call(call, text) for call in self._calls)

    def _deliver(self, delta: ToolCallDelta) -> None:
        (self._held if self._hold_calls else self._pieces).append(delta)

    def _close(self) -> None:
        assert self._open is not None
        self._open.end = self._cursor.position
        self._open = None
        self._spaces = []
        self._pieces += self._held
        self._held = []
        self._at_edge = True


def _tool_call(call: _Call, text: str) -> ToolCall:
    arguments_json = "".join(call.fragments)
    return ToolCall(
        name=call.name,
        arguments=json.loads(arguments_json) if call.is_complete else {},
        raw_text=text[call.start : call.end],
        start_pos=call.start,
        end_pos=call.end,
        id=call.id,
        arguments_json=arguments_json,
        is_complete=call.is_complete,
    )
