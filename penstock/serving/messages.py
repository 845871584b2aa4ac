"""Chat messages of OpenAI's API as chat templates take them.

Text parts become one string, reasoning may come under either of its names, and developers are the system. Every message
needs content, as in OpenAI's API; of the assistant's, those with something in its place may go without, and an empty
string is content. A part that is not text is refused, because the models are text-only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

from pydantic_core import from_json

from penstock.serving.errors import invalid

_STRINGS = ("name", "tool_call_id", "refusal", "reasoning_content", "reasoning")
# What an assistant's message may have in place of content.
_IN_PLACE_OF_CONTENT = ("tool_calls", "function_call", "refusal", "reasoning_content", "reasoning")


def plain_messages(messages: Iterable[Mapping[str, object]]) -> list[dict[str, object]]:
    """Copies of the messages. Raises `HttpError`."""
    return [_plain(message, f"messages.{number}") for number, message in enumerate(messages)]


def _plain(message: Mapping[str, object], where: str) -> dict[str, object]:
    role = message.get("role")
    if not isinstance(role, str):
        raise invalid(f"{where} needs a role, such as user", f"{where}.role")
    # Templates test whether there are calls by the name alone, and few of them know developers.
    plain = {
        name: value for name, value in message.items() if value is not None and (name, value) != ("tool_calls", [])
    }
    _check_strings(plain, _STRINGS, where)
    plain["role"] = "system" if role == "developer" else role
    plain["content"] = _content(role, plain, where)
    reasoning = message.get("reasoning_content", message.get("reasoning"))
    if role == "assistant" and isinstance(reasoning, str):
        plain["reasoning_content"] = plain["reasoning"] = reasoning
    if "tool_calls" in plain:
        plain["tool_calls"] = _tool_calls(plain["tool_calls"], f"{where}.tool_calls")
    return plain


def _content(role: str, message: Mapping[str, object], where: str) -> str:
    """The text of a message, or of the assistant's refusal."""
    content, may_lack = message.get("content"), role == "function"  # whose content may be null
    if role == "assistant":
        content = content or message.get("refusal", content)
        may_lack = any(name in message for name in _IN_PLACE_OF_CONTENT)
    if content in (None, []) and not may_lack:
        raise invalid(f"{where} needs content: a string, or a list of text parts", f"{where}.content")
    return _text(content, f"{where}.content")


def _check_strings(values: Mapping[str, object], names: Iterable[str], where: str) -> None:
    """Refuse fields of other types: a template would write them into the prompt somehow."""
    for name in names:
        if not isinstance(values.get(name, ""), str | None):
            raise invalid(f"{where}.{name} must be a string", f"{where}.{name}")


def _tool_calls(calls: object, where: str) -> list[dict[str, object]]:
    """The calls with their arguments as objects, which is what templates expect."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise invalid(f"{where} must be a list of objects", where)
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: Mapping[str, object], where: str) -> dict[str, object]:
    _check_strings(call, ("id", "type"), where)
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise invalid(f"{where} needs a function with a name", where)
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = from_json(arguments, allow_inf_nan=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _text(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(_text_of_part(part, where) for part in content)
    raise invalid(f"{where} must be a string or a list of text parts", where)


def _text_of_part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
    if kind in ("text", "input_text", "output_text", "refusal") and isinstance(text, str):
        return text
    shown = kind if isinstance(kind, str) else "something else"
    raise invalid(f"{where} has a part of type {shown[:40]!r}, but this model reads text only", where)
