"""`ChatTask`: one chat as the engine gets it, and how to read what comes back. Neutral of any API.

`prepare` turns messages, tools and demands on the output into a task; `submit_chat` starts it; an `OutputReader` splits
the text of one completion into content, reasoning and tool calls, the same way for streams and whole texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from penstock.errors import RequestError, concerning, shown
from penstock.outputs import CompletionOutput, Delta
from penstock.sampling import SamplingParams
from penstock.serving.model_formats import ModelFormats
from penstock.structured_outputs import StructuredOutputs
from penstock.tools import (
    ContentDelta,
    OutputParser,
    Piece,
    ReasoningDelta,
    ReasoningFormat,
    ReasoningSplitter,
    Tool,
    ToolCallDelta,
    ToolChoice,
    call_text,
    constraint,
    format_named,
    read_tool_choice,
    read_tools,
    tool_instructions,
)
from penstock.tools.grammars import Rules

NO_TOOLS = ToolChoice("none")
REGULAR_ENDS = ("stop", "length")
ChatPrompt = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of a chat. `is_parallel`: several calls may come at once."""

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = NO_TOOLS
    is_parallel: bool = True


@dataclass(frozen=True, slots=True)
class ChatTask:
    """A prompt with parameters. `continued` is the assistant's text that the model continues, if it does."""

    prompt: ChatPrompt
    params: SamplingParams
    formats: ModelFormats
    use: ToolUse
    continued: str = ""

    @property
    def reasoning(self) -> ReasoningFormat | None:
        """The format of the model's reasoning."""
        return self.formats.reasoning

    def begins_after_reasoning(self, text: str) -> bool:
        """Whether the rendered prompt ends the reasoning itself, as templates do when thinking is off."""
        return self.reasoning is not None and not self.continued and text.rstrip().endswith(self.reasoning.end)

    def without_reasoning(self) -> ChatTask:
        """The task of a model that does not reason this time: everything that it writes counts."""
        return replace(self, params=replace(self.params, reasoning_end=None))

    def reader(self, text: str) -> OutputReader:
        """A reader for one completion after the rendered prompt."""
        splitter = None
        if self.reasoning is not None:
            splitter = ReasoningSplitter(self.reasoning, is_open=self.reasoning.is_open_after(text, self.continued))
        has_tools = self.use.choice.mode != "none"
        parser = OutputParser(self.formats.tools if has_tools else None, self.use.tools, reasoning=splitter)
        return OutputReader(parser, self.use)


class OutputReader:
    """Reads one completion: `read` every delta, or `read_whole` once."""

    def __init__(self, parser: OutputParser, use: ToolUse) -> None:
        self._parser = parser
        self._use = use
        self._has_calls = False
        self._reasoning: list[str] = []

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(self._reasoning)

    def has_calls(self, stop: str | int | None) -> bool:
        """Whether tools were called, and `stop`, by which the output ended, did not cut off the last call."""
        if stop is None or not self._has_calls:
            return self._has_calls
        return self._parser.tool_calls()[-1 if self._use.is_parallel else 0].is_complete

    def read(self, delta: Delta) -> list[Piece]:
        """What a delta of the engine completes, in order."""
        pieces = self._parser.feed(delta.text)
        return self._kept(pieces + self._parser.finish() if delta.finished else pieces)

    def read_whole(self, completion: CompletionOutput) -> list[Piece]:
        """The pieces of a whole text: one for each call, and for each stretch of content or reasoning."""
        return self._kept([*self._parser.feed(completion.text), *self._parser.finish()])

    def finish_reason(self, reason: str | None, stop: str | int | None = None) -> str | None:
        """The reason that clients are told: an end after calls is `tool_calls`, unless the caller named the tool."""
        is_calling = reason == "stop" and self._use.choice.mode != "named" and self.has_calls(stop)
        return "tool_calls" if is_calling else reason

    def _kept(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Without the calls beyond the first where only one is allowed."""
        kept: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, ReasoningDelta):
                self._reasoning.append(piece.text)
            elif isinstance(piece, ToolCallDelta):
                if not self._use.is_parallel and piece.index:
                    continue
                self._has_calls = True
            kept.append(piece)
        return kept


def prepare(
    prompt: ChatPrompt,
    params: SamplingParams,
    formats: ModelFormats,
    *,
    use: ToolUse = ToolUse(),
    structure: StructuredOutputs | None = None,
    thinks: bool = True,
) -> ChatTask:
    """A task. `structure` is what an answer must be; `thinks=False` says that the caller turned reasoning off.

    Raises `RequestError`, `GrammarError`.
    """
    reasoning = formats.reasoning if thinks else None
    demand = _demand(use, structure, formats)
    changes: dict[str, object] = {}
    if demand is not None:
        changes["structured_outputs"] = demand
    if reasoning is not None and (demand is not None or params.stop):
        changes["reasoning_end"] = reasoning.end
    if _hides_markers(use, formats):
        changes["skip_special_tokens"] = False
    params = replace(params, **changes) if changes else params  # type: ignore[arg-type]  # checked by SamplingParams
    return ChatTask(_with_tools(_with_calls(prompt, formats), use, formats), params, formats, use, _continued(prompt))


def tool_use(tools: object, choice: object, *, is_parallel: bool = True, max_tools: int = 128) -> ToolUse:
    """The tools of a request, from any API's objects. Raises `RequestError`."""
    records = tuple(read_tools(tools, max_tools=max_tools))
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        records, choice = _allowed(records, choice)
    selected = read_tool_choice(choice, records) if records or choice not in (None, "auto") else NO_TOOLS
    return ToolUse(tools=records, choice=selected if records else NO_TOOLS, is_parallel=is_parallel)


@concerning("tool_choice")
def _allowed(tools: Sequence[Tool], choice: Mapping[str, object]) -> tuple[tuple[Tool, ...], str]:
    """Some of the tools, and the mode, of a choice of several; chats nest it. Raises `RequestError`."""
    nested = choice.get("allowed_tools", choice)
    listed, mode = (nested.get("tools"), nested.get("mode")) if isinstance(nested, Mapping) else (None, None)
    if not isinstance(listed, list) or not all(isinstance(tool, Mapping) for tool in listed):
        raise RequestError("tool_choice of type allowed_tools needs tools, a list of objects")
    if mode not in ("auto", "required"):
        raise RequestError(f'tool_choice of type allowed_tools needs a mode, "auto" or "required", not {shown(mode)}')
    names = [_name_of(tool) for tool in listed]
    if unknown := [name for name in names if name not in {tool.name for tool in tools}]:
        raise RequestError(f"tool_choice allows {shown(unknown[0])}, which is none of the tools")
    return tuple(tool for tool in tools if tool.name in names), mode


def _name_of(tool: Mapping[str, object]) -> object:
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, Mapping) else None


def _demand(use: ToolUse, structure: StructuredOutputs | None, formats: ModelFormats) -> StructuredOutputs | None:
    """What the output must be: calls, an answer of a certain structure, or either."""
    if use.choice.mode in ("required", "named"):
        choice: object = use.choice
    elif use.choice.mode == "auto" and structure is not None:
        choice = "required"
    else:
        return structure
    calls = constraint(use.tools, choice, formats.tools, use.is_parallel, special_tokens=formats.special_tokens)
    return _either(structure, calls) if use.choice.mode == "auto" and structure is not None else calls


def _either(structure: StructuredOutputs, calls: StructuredOutputs | None) -> StructuredOutputs | None:
    """An answer of this structure, or calls. Only JSON can be put beside calls."""
    if calls is None or calls.grammar is None or structure.kind not in ("json", "json_object"):
        return structure
    rules = Rules()
    rules.json(json.loads(structure.source))
    answer = rules.lines[0].partition(": ")[2]
    rest = calls.grammar.replace("start:", "calls:", 1)
    return StructuredOutputs(grammar=f"start: calls | answer\nanswer: {answer}\n{rest}")


def _hides_markers(use: ToolUse, formats: ModelFormats) -> bool:
    markers = format_named(formats.tools).special_tokens if use.choice.mode != "none" else ()
    if formats.reasoning is not None:
        markers += (formats.reasoning.start, formats.reasoning.end)
    return formats.hides_markers(*markers)


def _with_calls(prompt: ChatPrompt, formats: ModelFormats) -> ChatPrompt:
    """The prompt with the earlier calls in the assistant's text, where the template would leave them out."""
    messages = prompt["messages"]
    assert isinstance(messages, list)
    if formats.template_knows_calls or not any("tool_calls" in message for message in messages):
        return prompt
    return {**prompt, "messages": [_with_text_of_calls(message, formats.tools) for message in messages]}


def _with_text_of_calls(message: Mapping[str, object], format: str) -> Mapping[str, object]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    functions = [call["function"] for call in calls]
    texts = [call_text(function["name"], _mapping(function["arguments"]), format) for function in functions]
    return {**message, "content": "\n".join(filter(None, [str(message["content"]), *texts]))}


def _mapping(arguments: object) -> Mapping[str, object]:
    """The arguments of an earlier call; of one that is not an object, none."""
    return arguments if isinstance(arguments, Mapping) else {}


def _with_tools(prompt: ChatPrompt, use: ToolUse, formats: ModelFormats) -> ChatPrompt:
    """The prompt with the tools: for the template, or in the system message where it knows none."""
    if use.choice.mode == "none":
        return prompt
    if formats.template_knows_tools:
        return {**prompt, "tools": [tool.to_dict() for tool in use.tools]}
    messages = list(prompt["messages"])  # type: ignore[call-overload]  # a list of messages
    instructions = tool_instructions(use.tools, formats.tools)
    if messages and messages[0]["role"] == "system":
        messages[0] = {**messages[0], "content": f"{messages[0]['content']}\n\n{instructions}"}
    else:
        messages.insert(0, {"role": "system", "content": instructions})
    return {**prompt, "messages": messages}


def _continued(prompt: ChatPrompt) -> str:
    """The text of the assistant's message that the model continues, as `penstock.api.prompt` decides it."""
    messages = prompt["messages"]
    last = messages[-1] if isinstance(messages, Sequence) and messages else {}
    is_continued = last.get("role") == "assistant" and "tool_calls" not in last
    return str(last.get("content") or "") if prompt.get("continue_final_message", is_continued) else ""


def text_of_pieces(pieces: Sequence[Piece], kind: type[ContentDelta] | type[ReasoningDelta]) -> str:
    """The joined text of the pieces of one kind."""
    return "".join(piece.text for piece in pieces if isinstance(piece, kind))
