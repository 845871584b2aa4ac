"""Conversations of the Messages API as the chat messages that templates take.

Tool results become messages of their own, thinking becomes reasoning, and neighbouring messages of one role are joined,
as the API prescribes. A block that is not text is refused, because the models are text-only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from penstock.serving.errors import invalid

Blocks = str | Sequence[Mapping[str, object]]
_SEPARATORS = {"user": "\n", "assistant": "", "system": "\n"}


def chat_messages(system: Blocks | None, messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """The conversation in the shape of chat completions. Raises `HttpError`."""
    converted: list[dict[str, object]] = []
    if system:
        converted.append({"role": "system", "content": _text(system, "system", "\n")})
    for number, message in enumerate(messages):
        role, where = message.get("role"), f"messages.{number}"
        if role not in ("user", "assistant", "system"):
            raise invalid(f"{where}.role must be user or assistant", f"{where}.role")
        content, read = message.get("content"), _assistant_message if role == "assistant" else _other_messages
        if role == "user" and content in ("", []):
            raise invalid(f"{where} needs content, which must not be empty", f"{where}.content")
        converted += read(str(role), content, f"{where}.content")
    result = [_joined(list(group)) for _, group in groupby(converted, _Kinds())]
    if result and result[-1] == {"role": "assistant", "content": ""}:
        result.pop()  # nothing to continue
    return result


def _joined(messages: Sequence[dict[str, object]]) -> dict[str, object]:
    """Messages of one kind as one."""
    if len(messages) == 1:
        return messages[0]
    role = str(messages[0]["role"])
    texts = [str(message["content"]) for message in messages if message["content"]]
    return {"role": role, "content": _SEPARATORS[role].join(texts)}


class _Kinds:
    """Tells messages apart that must not be joined: those of another role, and those with more than text."""

    def __init__(self) -> None:
        self._num_messages = 0

    def __call__(self, message: Mapping[str, object]) -> object:
        self._num_messages += 1
        return message["role"] if set(message) == {"role", "content"} else self._num_messages


def _assistant_message(role: str, content: object, where: str) -> Iterator[dict[str, object]]:
    texts, thoughts, calls = list[str](), list[str](), list[object]()
    for block, place in _blocks(content, where):
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(_string(block, "thinking", place))
        elif kind == "tool_use":
            calls.append(_tool_call(block, place))
        elif kind != "redacted_thinking":  # belongs to a model of Anthropic's
            texts.append(_text_of(block, place))
    message: dict[str, object] = {"role": role, "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    yield message


def _other_messages(role: str, content: object, where: str) -> Iterator[dict[str, object]]:
    """Tool results and texts in their order."""
    texts: list[str] = []
    for block, place in _blocks(content, where):
        if block.get("type") != "tool_result":
            texts.append(_text_of(block, place))
            continue
        if texts:
            yield {"role": role, "content": "\n".join(texts)}
            texts = []
        text = _text(block.get("content") or "", f"{place}.content", "\n")
        yield {"role": "tool", "tool_call_id": _string(block, "tool_use_id", place), "content": text}
    if texts:
        yield {"role": role, "content": "\n".join(texts)}


def _tool_call(block: Mapping[str, object], where: str) -> dict[str, object]:
    arguments = block.get("input") or {}
    if not isinstance(arguments, Mapping):
        raise invalid(f"{where}.input must be an object", f"{where}.input")
    function = {"name": _string(block, "name", where), "arguments": arguments}
    return {"id": _string(block, "id", where), "type": "function", "function": function}


def _blocks(content: object, where: str) -> Iterator[tuple[Mapping[str, object], str]]:
    """Every block with its place."""
    if isinstance(content, str):
        yield {"type": "text", "text": content}, where
        return
    if not isinstance(content, Sequence):
        raise invalid(f"{where} must be a string or a list of content blocks", where)
    for number, block in enumerate(content):
        if not isinstance(block, Mapping):
            raise invalid(f"{where}.{number} must be an object with a type", f"{where}.{number}")
        yield block, f"{where}.{number}"


def _text(content: object, where: str, separator: str) -> str:
    return separator.join(_text_of(block, place) for block, place in _blocks(content, where))


def _text_of(block: Mapping[str, object], where: str) -> str:
    if block.get("type") == "text":
        return _string(block, "text", where)
    shown = str(block.get("type"))[:40]
    raise invalid(f"{where} is a block of type {shown!r}, but this model reads text only", where)


def _string(block: Mapping[str, object], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise invalid(f"{where}.{name} must be a string", f"{where}.{name}")
    return value
