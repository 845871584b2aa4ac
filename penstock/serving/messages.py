"""Chat messages of OpenAI's API as chat templates take them.

Text parts become one string, and reasoning may come under either of its names. Only an assistant, who may have called
tools instead, and a function may lack content, which then becomes empty. A part that is not text is refused, because
the models are text-only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

from pydantic_core import from_json

from penstock.serving.errors import invalid

_MAY_LACK_CONTENT = ("assistant", "function")


def plain_messages(messages: Iterable[Mapping[str, object]]) -> list[dict[str, object]]:
    """Copies of the messages. Raises `HttpError`."""
    return [_plain(message, f"messages.{number}") for number, message in enumerate(messages)]


def _plain(message: Mapping[str, object], where: str) -> dict[str, object]:
    role = message.get("role")
    if not isinstance(role, str):
        raise invalid(f"{where} needs a role, such as user", f"{where}.role")
    plain = {name: value for name, value in message.items() if value is not None}
    if "content" not in plain and role not in _MAY_LACK_CONTENT:
        raise invalid(f"{where} needs content: a string, or a list of text parts", f"{where}.content")
    plain["content"] = _text(plain.get("content"), f"{where}.content")
    reasoning = message.get("reasoning_content", message.get("reasoning"))
    if role == "assistant" and isinstance(reasoning, str):
        plain["reasoning_content"] = plain["reasoning"] = reasoning
    if "tool_calls" in plain:
        plain["tool_calls"] = _tool_calls(plain["tool_calls"], f"{where}.tool_calls")
    return plain


def _tool_calls(calls: object, where: str) -> list[dict[str, object]]:
    """The calls with their arguments as objects, which is what templates expect."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise invalid(f"{where} must be a list of objects", where)
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: Mapping[str, object], where: str) -> dict[str, object]:
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
