"""Builds the output items of a response from pieces, and the events that tell of them.

A response at once is built from the same pieces as a stream, so both have the same items.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.tools import ContentDelta, Piece, ReasoningDelta, ToolCallDelta

Event = dict[str, object]
_PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
_TEXTS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


@dataclass(slots=True)
class _Item:
    """An output item whose text is still growing."""

    type: str
    call: int = -1  # the number of a function call
    call_id: str | None = None
    name: str | None = None
    id: str = ""
    status: str = "in_progress"
    texts: list[str] = field(default_factory=list)
    logprobs: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = f"{_PREFIXES[self.type]}{uuid.uuid4().hex}"

    @property
    def text(self) -> str:
        """All that was added."""
        return "".join(self.texts)

    def part(self) -> Event:
        """Its only content part."""
        if self.type == "message":
            return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self.logprobs)}
        return {"type": "reasoning_text", "text": self.text}

    def value(self, has_parts: bool = True) -> Event:
        """The item as it is now."""
        head: Event = {"id": self.id, "type": self.type, "status": self.status}
        parts = [self.part()] if has_parts and self.type != "function_call" else []
        if self.type == "message":
            return {**head, "role": "assistant", "content": parts}
        if self.type == "reasoning":
            return {**head, "summary": [], "content": parts}
        return {**head, "call_id": self.call_id, "name": self.name, "arguments": self.text}


class OutputItems:
    """The items of one response. Events lack their sequence numbers."""

    def __init__(self) -> None:
        self._items: list[_Item] = []
        self._is_open = False

    def add(self, piece: Piece, logprobs: Sequence[object] = ()) -> list[Event]:
        """Add a piece, and the log probabilities that came with it."""
        events = [] if self._continues(piece) else [*self.close(), *self._open(_item_of(piece))]
        item = self._items[-1]
        text = piece.arguments if isinstance(piece, ToolCallDelta) else piece.text
        if text or logprobs:
            item.texts.append(text)
            item.logprobs += logprobs
            values: Event = {"logprobs": list(logprobs)} if item.type == "message" else {}
            events.append(self._event(f"{_TEXTS[item.type]}.delta", delta=text, **values))
        return events

    def close(self, status: str = "completed") -> list[Event]:
        """End the last item."""
        if not self._is_open:
            return []
        item = self._items[-1]
        item.status = status
        name = "arguments" if item.type == "function_call" else "text"
        values: Event = {"logprobs": list(item.logprobs)} if item.type == "message" else {}
        events = [self._event(f"{_TEXTS[item.type]}.done", **{name: item.text}, **values)]
        if item.type != "function_call":
            events.append(self._event("response.content_part.done", part=item.part()))
        self._is_open = False
        return [*events, self._item_event("response.output_item.done", item.value())]

    def finish(self, status: str, logprobs: Sequence[object] = ()) -> list[Event]:
        """End the output. Without any item, it gets an empty message."""
        events = self.add(ContentDelta(""), logprobs) if not self._items or logprobs else []
        return [*events, *self.close(status)]

    def value(self) -> list[Event]:
        """All items."""
        return [item.value() for item in self._items]

    def _continues(self, piece: Piece) -> bool:
        if not self._is_open:
            return False
        last = self._items[-1]
        if isinstance(piece, ToolCallDelta):
            return last.call == piece.index
        return last.type == ("reasoning" if isinstance(piece, ReasoningDelta) else "message")

    def _open(self, item: _Item) -> list[Event]:
        self._items.append(item)
        self._is_open = True
        events = [self._item_event("response.output_item.added", item.value(has_parts=False))]
        if item.type != "function_call":
            events.append(self._event("response.content_part.added", part=item.part()))
        return events

    def _item_event(self, kind: str, item: Event) -> Event:
        return {"type": kind, "output_index": len(self._items) - 1, "item": item}

    def _event(self, kind: str, **values: object) -> Event:
        item = self._items[-1]
        place: Event = {"item_id": item.id, "output_index": len(self._items) - 1}
        if item.type != "function_call":
            place["content_index"] = 0
        return {"type": kind, **place, **values}


def _item_of(piece: Piece) -> _Item:
    if isinstance(piece, ToolCallDelta):
        return _Item("function_call", piece.index, piece.id, piece.name)
    return _Item("reasoning" if isinstance(piece, ReasoningDelta) else "message")
