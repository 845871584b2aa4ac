"""Chat templates on the client's side: messages as templates expect them, rendered or encoded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import cast

from penstock.backends.services.hf_tokenizer import Tokenizer
from penstock.errors import RequestError, described, shown
from penstock.tools import read_tools
from penstock.values import items


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, object]],
    tools: Sequence[object] | None = None,
    *,
    tokenize: bool = False,
    **options: object,
) -> str | list[int]:
    """The prompt of a conversation as text, or as token ids. Raises `RequestError` for what the template refuses."""
    listed = [tool.to_dict() for tool in read_tools(tools)] or None
    if tokenize:
        options["return_dict"] = False
    try:
        prompt = tokenizer.apply_chat_template(list(messages), tools=listed, tokenize=tokenize, **options)
    except Exception as error:  # templates raise whatever they like
        raise RequestError(f"the chat template cannot render these messages: {described(error)}") from error
    return [int(token) for token in prompt] if tokenize else cast(str, prompt)


def with_arguments_as_objects(messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Copies of the messages. Arguments of tool calls that are JSON text become objects, as templates expect.

    Raises `RequestError` for anything but a list of messages.
    """
    return [_with_objects(_copy(*numbered)) for numbered in enumerate(items("messages", messages))]


def _copy(number: int, message: object) -> dict[str, object]:
    try:
        return dict(cast(Mapping[str, object], message))  # or an object of an SDK
    except (TypeError, ValueError):
        raise RequestError(
            f"message {number} must be an object with a role and content, not {shown(message)}"
        ) from None


def _with_objects(message: dict[str, object]) -> dict[str, object]:
    calls = message.get("tool_calls")
    if isinstance(calls, Sequence) and not isinstance(calls, str):
        message["tool_calls"] = [_call_with_object(call) for call in calls]
    return message


def _call_with_object(call: object) -> object:
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if isinstance(call, Mapping) and isinstance(function, Mapping) and isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            return {**call, "function": {**function, "arguments": json.loads(arguments or "{}")}}
    return call
