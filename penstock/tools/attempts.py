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

# What begins a call beyond doubt, and what ends it. In the other formats, what is no complete call may be prose.
_MARKERS: Mapping[str, tuple[str, str]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "qwen3_coder": ("<tool_call>|<function=", "</tool_call>"),
    "mistral": (r"\[TOOL_CALLS\]", r"(?!)"),
    "llama3": (r"<\|python_tag\|>", r"(?!)"),
    "xml": ("<function_calls>|<invoke", "</function_calls>"),
}
_NEVER = (r"(?!)", r"(?!)")


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
    opening, closing = (re.compile(marker) for marker in _MARKERS.get(format_named(format).name, _NEVER))
    attempts: list[ToolAttempt] = []
    calls = parse_output(text, format, tools).tool_calls
    starts = [call.start_pos for call in calls[1:]] + [len(text)]
    attempts += _failed(text, 0, calls[0].start_pos if calls else len(text), opening, closing, is_cut)
    for call, limit in zip(calls, starts, strict=bool(calls)):
        attempt = _attempt(text, call, limit, opening, closing, is_cut)
        attempts.append(attempt)
        attempts += _failed(text, attempt.end_pos, limit, opening, closing, is_cut)
    return tuple(attempts)


def _attempt(
    text: str, call: ToolCall, limit: int, opening: re.Pattern[str], closing: re.Pattern[str], is_cut: bool
) -> ToolAttempt:
    """A call that was read up to its arguments; one that is incomplete takes the text up to its end with it."""
    end = call.end_pos if call.is_complete else _end_of(text, call.end_pos, limit, opening, closing)
    status: Literal["complete", "malformed", "cut"] = "malformed"
    if call.is_complete:
        status = "complete"
    elif is_cut and end == len(text):
        status = "cut"
    raw_text = text[call.start_pos : end]
    return ToolAttempt(status, raw_text, call.start_pos, end, call.name, call.arguments, call.arguments_json)


def _failed(
    text: str, start: int, limit: int, opening: re.Pattern[str], closing: re.Pattern[str], is_cut: bool
) -> Iterator[ToolAttempt]:
    """The attempts in a stretch of text without a call: markers that no name followed."""
    while (match := opening.search(text, start, limit)) is not None:
        content = re.compile(r"\s*").match(text, match.end(), limit)
        nested = opening.match(text, content.end(), limit) if content else None
        end = _end_of(text, nested.end() if nested else match.end(), limit, opening, closing)
        is_open = end == len(text) and closing.search(text, match.end(), end) is None
        yield ToolAttempt("cut" if is_cut and is_open else "malformed", text[match.start() : end], match.start(), end)
        start = end


def _end_of(text: str, start: int, limit: int, opening: re.Pattern[str], closing: re.Pattern[str]) -> int:
    """Where an attempt ends: behind its closing marker, or before the next opening one."""
    following = opening.search(text, start, limit)
    limit = following.start() if following else limit
    match = closing.search(text, start, limit)
    return match.end() if match else limit
