"""Builds the message of `/v1/messages`: its content blocks, the events of a stream, stop reason and usage.

A message at once is built from the same pieces as a stream, so both have the same blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic_core import from_json

from penstock.serving.generation import Usage
from penstock.tools import ContentDelta, Piece, ReasoningDelta, ToolCallDelta

Event = dict[str, object]
_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}


@dataclass(slots=True)
class _Block:
    """A content block whose text is still growing."""

    type: str
    head: Mapping[str, object] = field(default_factory=dict)
    call: int = -1  # the number of a tool call
    texts: list[str] = field(default_factory=list)

    def start(self) -> dict[str, object]:
        """The block as it begins."""
        empty: dict[str, Mapping[str, object]] = {
            "text": {"text": "", "citations": None},
            "thinking": {"thinking": "", "signature": ""},
            "tool_use": {**self.head, "input": {}},
        }
        return {"type": self.type, **empty[self.type]}

    def content(self, is_shown: bool = True) -> dict[str, object]:
        """The block with all that was added."""
        text = "".join(self.texts)
        if self.type == "text":
            return {**self.start(), "text": text}
        if self.type == "thinking":
            return {**self.start(), "thinking": text if is_shown else "", "signature": self.signature()}
        return {**self.start(), "input": _arguments(text)}

    def signature(self) -> str:
        """Marks the thinking as this server's, for clients that send it back only with a signature."""
        return hashlib.sha256("".join(self.texts).encode(errors="replace")).hexdigest()


class ContentBlocks:
    """The blocks of one message. `thinking` says what becomes of reasoning: "shown", "omitted" or "dropped"."""

    def __init__(self, thinking: str = "shown") -> None:
        self._thinking = thinking
        self._blocks: list[_Block] = []
        self._is_open = False

    def add(self, piece: Piece) -> list[Event]:
        """Add a piece; returns the events that tell of it."""
        block = _block_of(piece)
        if block.type == "thinking" and self._thinking == "dropped":
            return []
        events = [] if self._continues(block) else [*self.close(), self._open(block)]
        text = piece.arguments if isinstance(piece, ToolCallDelta) else piece.text
        if text:
            self._blocks[-1].texts.append(text)
            if block.type != "thinking" or self._thinking == "shown":
                kind, name = _DELTAS[block.type]
                events.append(self._event("content_block_delta", delta={"type": kind, name: text}))
        return events

    def close(self) -> list[Event]:
        """End the last block."""
        if not self._is_open:
            return []
        self._is_open = False
        events, block = [], self._blocks[-1]
        if block.type == "thinking":
            delta = {"type": "signature_delta", "signature": block.signature()}
            events.append(self._event("content_block_delta", delta=delta))
        return [*events, self._event("content_block_stop")]

    def content(self) -> list[dict[str, object]]:
        """All blocks."""
        return [block.content(self._thinking == "shown") for block in self._blocks]

    def _continues(self, block: _Block) -> bool:
        if not self._is_open:
            return False
        last = self._blocks[-1]
        return (last.type, last.call) == (block.type, block.call)

    def _open(self, block: _Block) -> Event:
        self._blocks.append(block)
        self._is_open = True
        return self._event("content_block_start", content_block=block.start())

    def _event(self, kind: str, **values: object) -> Event:
        return {"type": kind, "index": len(self._blocks) - 1, **values}


def _block_of(piece: Piece) -> _Block:
    if isinstance(piece, ContentDelta):
        return _Block("text")
    if isinstance(piece, ReasoningDelta):
        return _Block("thinking")
    return _Block("tool_use", {"id": piece.id, "name": piece.name}, piece.index)


def _arguments(text: str) -> dict[str, object]:
    """The arguments of a call; of one that was cut off, those that are there."""
    try:
        value = from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def stop_reason(finish_reason: str | None, stop: str | int | None, has_calls: bool, is_at_limit: bool) -> str:
    """Why the message ended. `is_at_limit`: `max_tokens` were generated, rather than what the context had room for."""
    if finish_reason == "length":
        return "max_tokens" if is_at_limit else "model_context_window_exceeded"
    if has_calls:
        return "tool_use"
    return "stop_sequence" if isinstance(stop, str) else "end_turn"


def usage_json(usage: Usage) -> dict[str, object]:
    """Counts of tokens. Those read from the cache are not among the input tokens, as the API defines them."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }
