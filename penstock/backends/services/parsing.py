"""A sampled answer as a chat message: content, reasoning, tool calls, and every attempt at one.

Nothing raises for what a model writes. A malformed call stays in the content, and is an attempt too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.backends.services.records import Json
from penstock.tools import (
    ReasoningSplitter,
    Tool,
    ToolAttempt,
    ToolCall,
    parse_output,
    read_attempts,
    reasoning_format_named,
    reasoning_format_of,
    tool_format_of,
)


@dataclass(frozen=True, slots=True)
class OutputFormats:
    """How a model writes calls and reasoning, as names of `penstock.tools`; None for no reasoning."""

    tools: str = "json"
    reasoning: str | None = None

    @classmethod
    def of_template(cls, template: object, tools: str | None, reasoning: str | None) -> OutputFormats:
        """The given names, and for those that are None what the chat template shows."""
        text = template if isinstance(template, str) else None
        return cls(tools or tool_format_of(text), reasoning or reasoning_format_of(text))


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, split into its parts. `tool_calls` are the complete ones."""

    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    attempts: tuple[ToolAttempt, ...] = ()

    @property
    def is_valid(self) -> bool:
        """Whether every attempt at a call succeeded."""
        return all(attempt.status == "complete" for attempt in self.attempts)

    def finish_reason(self, reason: str) -> str:
        """The finish reason of a chat: "tool_calls" where the model stopped after calls."""
        return "tool_calls" if self.tool_calls and reason == "stop" else reason

    def message(self) -> Json:
        """The message in the shape of OpenAI's API."""
        message: Json = {"role": "assistant", "content": self.content or (None if self.tool_calls else "")}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        return message


def read_answer(
    text: str, formats: OutputFormats, tools: Sequence[Tool] | None, *, prompt: str = "", is_cut: bool = False
) -> Answer:
    """Split a whole answer. `tools` is None if no call is looked for; `prompt` is the end of the rendered prompt."""
    splitter = None
    if formats.reasoning is not None:
        format = reasoning_format_named(formats.reasoning)
        splitter = ReasoningSplitter(format, is_open=format.is_open_after(prompt))
    output = parse_output(text, reasoning=splitter)
    if tools is None:
        return Answer(output.content, output.reasoning)
    parsed = parse_output(output.content, formats.tools, tools, hold_calls=True)
    calls = tuple(call for call in parsed.tool_calls if call.is_complete)
    attempts = read_attempts(output.content, formats.tools, tools, is_cut=is_cut)
    return Answer(parsed.content, output.reasoning, calls, attempts)
