"""Items of the Responses API: read into the shape in which they are kept, and as messages for chat templates."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence

from penstock.serving.errors import invalid

Item = dict[str, object]
_ROLES = ("user", "system", "developer", "assistant")
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")


def read_items(value: str | Sequence[Mapping[str, object]]) -> list[Item]:
    """The items of an input, complete with ids. Raises `HttpError`."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    return [_read_item(item, f"input.{number}") for number, item in enumerate(value)]


def chat_messages(instructions: str | None, items: Sequence[Item]) -> list[dict[str, object]]:
    """A conversation as chat messages. System messages at its beginning are joined with the instructions."""
    num_leading = next((i for i, item in enumerate(items) if not _is_system(item)), len(items))
    texts = [text_of(item["content"]) for item in items[:num_leading]]
    conversation = _Conversation("\n\n".join(filter(None, [instructions, *texts])))
    for item in items[num_leading:]:
        conversation.add(item)
    return conversation.messages


def _is_system(item: Item) -> bool:
    return item.get("role") in ("system", "developer")


class _Conversation:
    """Collects messages. Reasoning, text and calls of one turn become one message of the assistant."""

    def __init__(self, system: str) -> None:
        self.messages: list[dict[str, object]] = [{"role": "system", "content": system}] if system else []
        self._reasoning = ""

    def add(self, item: Item) -> None:
        """Add an item that was read."""
        kind = item["type"]
        if kind == "message":
            self._add_message(str(item["role"]), text_of(item["content"]))
        elif kind == "function_call":
            self._add_call(item)
        elif kind == "function_call_output":
            content = text_of(item["output"])
            self.messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
        else:
            self._reasoning = text_of(item.get("content") or item.get("summary") or "")

    def _add_message(self, role: str, text: str) -> None:
        if role == "developer":
            role = "system"  # templates know this name only
        self.messages.append({"role": role, "content": text, **self._take_reasoning(role)})

    def _add_call(self, item: Item) -> None:
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        last = self.messages[-1] if self.messages else {}
        if last.get("role") == "assistant" and not self._reasoning:
            calls = last.setdefault("tool_calls", [])
            assert isinstance(calls, list)
            calls.append(call)
        else:
            message = {"role": "assistant", "content": "", "tool_calls": [call]}
            self.messages.append({**message, **self._take_reasoning("assistant")})

    def _take_reasoning(self, role: str) -> dict[str, object]:
        reasoning, self._reasoning = self._reasoning, ""
        return {"reasoning_content": reasoning} if reasoning and role == "assistant" else {}


def text_of(content: object) -> str:
    """The text of content that was read."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text", part.get("refusal", ""))) for part in content)
    return str(content)


def _read_item(item: Mapping[str, object], where: str) -> Item:
    kind = item.get("type", "message" if "role" in item else None)
    read = _READERS.get(kind) if isinstance(kind, str) else None
    if read is None:
        known = ", ".join(_READERS)
        raise invalid(f"{where} is an item of type {str(kind)[:40]!r}: supported are {known}", f"{where}.type")
    return read(item, where)


def _read_message(item: Mapping[str, object], where: str) -> Item:
    role = item.get("role")
    if role not in _ROLES:
        raise invalid(f"{where}.role must be one of {', '.join(_ROLES)}", f"{where}.role")
    kind = "output_text" if role == "assistant" else "input_text"
    content = _parts(item.get("content"), kind, f"{where}.content")
    return {"id": _id(item, "msg_"), "type": "message", "status": "completed", "role": role, "content": content}


def _read_call(item: Mapping[str, object], where: str) -> Item:
    fields = {name: _string(item, name, where) for name in ("call_id", "name", "arguments")}
    return {"id": _id(item, "fc_"), "type": "function_call", "status": "completed", **fields}


def _read_call_output(item: Mapping[str, object], where: str) -> Item:
    output = item.get("output")
    if not isinstance(output, str):
        output = _parts(output, "input_text", f"{where}.output")
    fields = {"call_id": _string(item, "call_id", where), "output": output}
    return {"id": _id(item, "fco_"), "type": "function_call_output", "status": "completed", **fields}


def _read_reasoning(item: Mapping[str, object], where: str) -> Item:
    content = _parts(item.get("content") or [], "reasoning_text", f"{where}.content")
    summary = _parts(item.get("summary") or [], "summary_text", f"{where}.summary")
    return {"id": _id(item, "rs_"), "type": "reasoning", "summary": summary, "content": content}


_READERS: Mapping[str, Callable[[Mapping[str, object], str], Item]] = {
    "message": _read_message,
    "function_call": _read_call,
    "function_call_output": _read_call_output,
    "reasoning": _read_reasoning,
}


def _parts(content: object, kind: str, where: str) -> list[Item]:
    """Parts of this type with the text of each part."""
    if isinstance(content, str):
        content = [{"type": kind, "text": content}]
    if not isinstance(content, list):
        raise invalid(f"{where} must be a string or a list of text parts", where)
    extra: Item = {"annotations": []} if kind == "output_text" else {}
    texts = [_part_text(part, f"{where}.{number}") for number, part in enumerate(content)]
    return [{"type": kind, "text": text, **extra} for text in texts]


def _part_text(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
    if kind in _TEXT_PARTS and isinstance(text, str):
        return text
    raise invalid(f"{where} is a part of type {str(kind)[:40]!r}, but this model reads text only", where)


def _string(item: Mapping[str, object], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise invalid(f"{where}.{name} must be a string", f"{where}.{name}")
    return value


def _id(item: Mapping[str, object], prefix: str) -> str:
    value = item.get("id")
    return value if isinstance(value, str) and value else f"{prefix}{uuid.uuid4().hex}"
