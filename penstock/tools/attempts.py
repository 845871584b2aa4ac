"""What a model tried to call, also where it failed: complete calls, malformed ones, and those that the end cut off.

For rollouts, in which a malformed call earns a reward of its own and must neither raise nor vanish. Works on whole
texts, so the way in which a text arrived has no influence. Called by service clients.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from penstock.tools.definitions import Tool
from penstock.tools.output_parser import format_named, parse_output
from penstock.tools.pieces import ToolCall

# What begins a call beyond doubt, and what ends it. In JSON without a marker, an incomplete call may be data.
_MARKERS: Mapping[str, tuple[str, str]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "qwen3_coder": ("<tool_call>|<function=", "</tool_call>"),
    "mistral": (r"\[TOOL_CALLS\]", r"(?!)"),
    "llama3": (r"<\|python_tag\|>", r"(?!)"),
    "xml": ("<function_calls>|<invoke", "</function_calls>"),
    "json": (r"(?!)", r"(?!)"),
}
_SPACES = re.compile(r"\s*+")


@dataclass(frozen=True, slots=True)
class _Markers:
    """Where attempts begin and end in a text; a group of `opening` is the name that it calls."""

    opening: re.Pattern[str]
    closing: re.Pattern[str]

    @classmethod
    def of(cls, format: str, tools: Sequence[Tool]) -> _Markers:
        """The markers of a format. Calls in Python begin with the name of a tool."""
        names = "|".join(re.escape(tool.name) for tool in tools) or r"(?!)"
        opening, closing = _MARKERS.get(format, (rf"(?<![\w.])({names})\(", r"\)"))
        return cls(re.compile(opening), re.compile(closing))

    def end_of(self, text: str, start: int, limit: int) -> int:
        """Where an attempt ends: behind its closing marker, or before the next opening one."""
        following = self.opening.search(text, start, limit)
        limit = following.start() if following else limit
        match = self.closing.search(text, start, limit)
        return match.end() if match else limit


@dataclass(frozen=True, slots=True)
class ToolAttempt:
    """One attempt at a call: `text[start_pos:end_pos]` of the text is `raw_text`.

    `name` is None if the text is malformed before it; `arguments` are empty unless the call is complete, and
    `arguments_json` is as much of them as could be read.
    """

    status: Literal["complete", "malformed", "cut"]
    raw_text: str
    start_pos: int
    end_pos: int
    name: str | None = None
    arguments: dict[str, object] = field(default_factory=dict)
    arguments_json: str = ""

    def to_dict(self) -> dict[str, object]:
        """The attempt as JSON."""
        return {
            "status": self.status,
            "name": self.name,
            "arguments": self.arguments,
            "arguments_json": self.arguments_json,
            "raw_text": self.raw_text,
        }


def read_attempts(
    text: str, format: str, tools: Sequence[Tool] = (), *, is_cut: bool = False
) -> tuple[ToolAttempt, ...]:
    """Every attempt in a whole text, in order. Raises `RequestError` for an unknown format, and for no text.

    `is_cut` says that the model was stopped (`finish_reason` "length"), so that an attempt which reaches the end of the
    text was cut off; otherwise it is malformed.
    """
    markers = _Markers.of(format_named(format).name, tools)
    calls = parse_output(text, format, tools).tool_calls
    starts = [call.start_pos for call in calls] + [len(text)]
    attempts = list(_failed(text, 0, starts[0], markers, is_cut))
    for call, limit in zip(calls, starts[1:], strict=True):
        attempt = _attempt(text, call, limit, markers, is_cut)
        attempts += [attempt, *_failed(text, attempt.end_pos, limit, markers, is_cut)]
    return tuple(attempts)


def _attempt(text: str, call: ToolCall, limit: int, markers: _Markers, is_cut: bool) -> ToolAttempt:
    """A call that was read up to its arguments; one that is incomplete takes the text up to its end with it."""
    end = call.end_pos if call.is_complete else markers.end_of(text, call.end_pos, limit)
    status: Literal["complete", "malformed", "cut"] = "malformed"
    if call.is_complete:
        status = "complete"
    elif is_cut and end == len(text):
        status = "cut"
    raw_text = text[call.start_pos : end]
    return ToolAttempt(status, raw_text, call.start_pos, end, call.name, call.arguments, call.arguments_json)


def _failed(text: str, start: int, limit: int, markers: _Markers, is_cut: bool) -> Iterator[ToolAttempt]:
    """The attempts in a stretch of text without a call: openings that led to none."""
    while (match := markers.opening.search(text, start, limit)) is not None:
        spaces = _SPACES.match(text, match.end())
        nested = markers.opening.match(text, spaces.end() if spaces else limit, limit)
        end = markers.end_of(text, nested.end() if nested else match.end(), limit)
        is_open = end == len(text) and markers.closing.search(text, match.end(), end) is None
        status: Literal["malformed", "cut"] = "cut" if is_cut and is_open else "malformed"
        name = match[1] if match.re.groups else None
        yield ToolAttempt(status, text[match.start() : end], match.start(), end, name)
        start = end
