"""The pieces of an output as OpenAI's chat API has them: messages, and deltas of messages.

Reasoning has two names, of which clients know one or the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.serving.chat_task import text_of_pieces
from penstock.tools import ContentDelta, Piece, ReasoningDelta, ToolCallDelta


def delta_of(piece: Piece) -> dict[str, object]:
    """A delta. The first of a call has its id and name, and no later one has."""
    if isinstance(piece, ContentDelta):
        return {"content": piece.text}
    if isinstance(piece, ReasoningDelta):
        return {"reasoning_content": piece.text, "reasoning": piece.text}
    call: dict[str, object] = {"index": piece.index}
    function: dict[str, object] = {"arguments": piece.arguments}
    if piece.id is not None:
        call |= {"id": piece.id, "type": "function"}
        function = {"name": piece.name, **function}
    return {"tool_calls": [{**call, "function": function}]}


def message_of(pieces: Sequence[Piece]) -> dict[str, object]:
    """A whole message. Its content is null if there are calls and no text."""
    content, reasoning = text_of_pieces(pieces, ContentDelta), text_of_pieces(pieces, ReasoningDelta)
    calls = tool_calls_of(pieces)
    message: dict[str, object] = {"role": "assistant", "content": content if content or not calls else None}
    message["refusal"] = None
    if reasoning:
        message |= {"reasoning_content": reasoning, "reasoning": reasoning}
    if calls:
        message["tool_calls"] = calls
    return message


def tool_calls_of(pieces: Sequence[Piece]) -> list[dict[str, object]]:
    """The calls, each with all of its arguments."""
    calls: dict[int, dict[str, object]] = {}
    arguments: dict[int, str] = {}
    for piece in pieces:
        if isinstance(piece, ToolCallDelta):
            calls.setdefault(piece.index, {"id": piece.id, "type": "function", "name": piece.name})
            arguments[piece.index] = arguments.get(piece.index, "") + piece.arguments
    return [
        {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": arguments[index]}}
        for index, call in calls.items()
    ]
