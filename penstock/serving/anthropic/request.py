"""The bodies of `/v1/messages` and `/v1/messages/count_tokens`, and the prompt and parameters that they mean."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from penstock.sampling import SamplingParams
from penstock.serving.anthropic.content import chat_messages
from penstock.serving.body import Listed, RequestModel
from penstock.serving.chat_request import TemplateFields
from penstock.serving.chat_task import ChatTask, prepare, tool_use
from penstock.serving.errors import invalid
from penstock.serving.model_formats import ModelFormats
from penstock.serving.sampling_fields import MAX_INT, SamplingFields, check_limit
from penstock.serving.settings import ServingSettings
from penstock.serving.structure_fields import VllmStructureFields
from penstock.structured_outputs import StructuredOutputs


class TextBlock(RequestModel):
    """A block of a system prompt."""

    type: Literal["text"]
    text: str


class Thinking(RequestModel):
    """Whether the model reasons, and whether its reasoning is shown. A budget is not enforced."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(RequestModel):
    """A schema that the answer satisfies."""

    type: Literal["json_schema"]
    json_schema: dict[str, object] = Field(alias="schema")


class OutputConfig(RequestModel):
    """The form of the answer, and the effort to spend on it."""

    effort: str | None = None
    format: OutputFormat | None = None


class ToolChoiceFields(RequestModel):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class CountTokensRequest(TemplateFields, VllmStructureFields):
    """A conversation."""

    messages: Listed[dict[str, object]] = Field(min_length=1)
    model: str | None = None
    system: str | Listed[TextBlock] | None = None
    tools: Listed[dict[str, object]] | None = None
    tool_choice: ToolChoiceFields | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def chat_task(self, settings: ServingSettings, formats: ModelFormats, params: SamplingParams) -> ChatTask:
        """The conversation as the engine takes it. Raises `HttpError`, `RequestError`."""
        messages = self._chat_messages()  # more than there were, if tool results are among them
        check_limit("messages", max(len(messages), len(self.messages)), settings.max_messages, "messages")
        choice, template = self.tool_choice, self._template()
        use = tool_use(
            *(self.tools, None if choice is None else choice.model_dump(exclude_none=True)),
            is_parallel=choice is None or not choice.disable_parallel_tool_use,
            max_tools=settings.max_tools,
        )
        prompt, structure = template.chat(messages), self._structure()
        return prepare(prompt, params, formats, use=use, structure=structure, thinks=template.thinks)

    def _chat_messages(self) -> list[dict[str, object]]:
        system = [block.model_dump() for block in self.system] if isinstance(self.system, list) else self.system
        messages = chat_messages(system, self.messages)
        if all(message["role"] == "system" for message in messages):
            raise invalid("messages needs a message with content", "messages")
        return messages

    def _template(self) -> TemplateFields:
        """How the chat is rendered: a last message of the assistant is always continued."""
        arguments = dict(self.chat_template_kwargs or {})
        if self.thinking is not None:
            arguments.setdefault("enable_thinking", self.thinking.type != "disabled")
        effort = self.output_config.effort if self.output_config is not None else None
        return TemplateFields(
            documents=self.documents,
            chat_template=self.chat_template,
            chat_template_kwargs=arguments,
            reasoning_effort=effort or self.reasoning_effort,
        )

    def _structure(self) -> StructuredOutputs | None:
        form = None if self.output_config is None else self.output_config.format
        from_format = None if form is None else StructuredOutputs(json=form.json_schema)
        return self.structure_beside(from_format, "output_config.format")


class MessagesRequest(CountTokensRequest, SamplingFields):
    """A message to create."""

    max_tokens: int = Field(ge=1, le=MAX_INT)
    stop_sequences: Listed[str] | None = None
    stream: bool | None = False
    metadata: dict[str, object] | None = None

    def task(self, settings: ServingSettings, formats: ModelFormats, base: SamplingParams | None) -> ChatTask:
        """The conversation and its parameters; `base` has the model's. Raises `HttpError`, `RequestError`."""
        if max(self.n or 1, self.best_of or 1) > 1:
            raise invalid("this API answers with one message: leave n and best_of out", "n")
        if self.stop is not None:
            raise invalid("stop is called stop_sequences here", "stop")
        stops = self.stop_sequences or []
        check_limit("stop_sequences", len(stops), settings.max_stop, "stop sequences")
        return self.chat_task(
            settings, formats, self.params(settings, base=base, max_tokens=self.max_tokens, stop=stops)
        )
