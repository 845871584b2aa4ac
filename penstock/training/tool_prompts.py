"""Tells a model in its prompt which tools it has, in the format in which its calls will be read.

Called by `InferenceModule.batch_generate_with_tools`.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.api.prompt import Message, Prompt, is_chat
from penstock.errors import RequestError
from penstock.tools import Tool, read_tools, renders_tools, tool_format_of, tool_instructions


def read_available_tools(tools: Sequence[object] | None) -> list[Tool]:
    """Tools in any of the shapes that `read_tools` takes, or as names alone. Raises `RequestError`."""
    if isinstance(tools, str) or not isinstance(tools, Sequence):  # `read_tools` says what is wrong
        return read_tools(tools)
    return read_tools([{"name": tool} if isinstance(tool, str) else tool for tool in tools])


def with_tools(prompt: Prompt, tools: Sequence[Tool], format: str, template: str | None) -> Prompt:
    """The prompt as a chat that has the tools, or as a text behind them for a model without a chat template.

    The template writes the tools if it does so for this format of calls; otherwise the system message names them. A
    text is a user's message. Raises `RequestError` for token ids.
    """
    if not tools:
        return prompt
    if isinstance(prompt, str) and template is None:
        return f"{tool_instructions(tools, format)}\n\n{prompt}"
    messages = _messages(prompt)
    if renders_tools(template) and tool_format_of(template) == format:
        return {"messages": messages, "tools": [tool.to_dict() for tool in tools]}
    return _with_system(messages, tool_instructions(tools, format))


def _messages(prompt: Prompt) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if is_chat(prompt):
        return list(prompt)
    raise RequestError("only texts and chats can be told of tools: put them into the prompt yourself")


def _with_system(messages: list[Message], instructions: str) -> list[Message]:
    """The chat with these instructions in its system message."""
    if messages[0].get("role") != "system":
        return [{"role": "system", "content": instructions}, *messages]
    system = f"{messages[0].get('content')}\n\n{instructions}"
    return [{**messages[0], "content": system}, *messages[1:]]
