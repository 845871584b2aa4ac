"""What a parser delivers: pieces of content, of reasoning and of tool calls, and the calls of a whole text.

Plain records. The parsers make them; servers turn them into the chunks of their protocols.
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Iterable
from dataclasses import dataclass, field

_CHARACTERS = (string.ascii_letters + string.digits).encode()
_CHARACTER_OF_BYTE = bytes(_CHARACTERS[byte % len(_CHARACTERS)] for byte in range(256))


def random_id(prefix: str = "call_", length: int = 24) -> str:
    """A new id of a tool call."""
    return prefix + os.urandom(length).translate(_CHARACTER_OF_BYTE).decode()


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Text of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A part of call number `index`. Only the first has `id` and `name`; `arguments` is a fragment of JSON text."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


Piece = ContentDelta | ReasoningDelta | ToolCallDelta


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool: `text[start_pos:end_pos]` of the parsed text is `raw_text`.

    `arguments_json` is the JSON text as the model wrote it. A call that the text cuts off has `is_complete=False`, the
    beginning of its `arguments_json`, and empty `arguments`.
    """

    name: str
    arguments: dict[str, object] = field(default_factory=dict)
    raw_text: str = ""
    start_pos: int = 0
    end_pos: int = 0
    id: str = field(default_factory=random_id)
    arguments_json: str = ""
    is_complete: bool = True

    def to_dict(self) -> dict[str, object]:
        """The call as OpenAI's chat messages have it."""
        arguments = self.arguments_json or json.dumps(self.arguments, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


@dataclass(frozen=True, slots=True)
class ParsedOutput:
    """A whole output, split into its parts."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same pieces, with neighbours of one kind, or of one call, made one."""
    merged: list[Piece] = []
    for piece in pieces:
        neighbour = _merged(merged[-1], piece) if merged else None
        if neighbour is None:
            merged.append(piece)
        else:
            merged[-1] = neighbour
    return merged


def _merged(first: Piece, second: Piece) -> Piece | None:
    """Both pieces as one, or None if they are of different kinds or calls."""
    if isinstance(first, ToolCallDelta) and isinstance(second, ToolCallDelta):
        if first.index != second.index:
            return None
        return ToolCallDelta(first.index, first.arguments + second.arguments, first.id, first.name)
    if isinstance(first, ContentDelta) and isinstance(second, ContentDelta):
        return ContentDelta(first.text + second.text)
    if isinstance(first, ReasoningDelta) and isinstance(second, ReasoningDelta):
        return ReasoningDelta(first.text + second.text)
    return None
