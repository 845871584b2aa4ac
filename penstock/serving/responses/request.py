"""The bodies of `/v1/responses` and `/v1/responses/input_tokens`, and the prompt and parameters that they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from penstock.sampling import SamplingParams
from penstock.serving.body import Listed, RequestModel
from penstock.serving.chat_request import TemplateFields
from penstock.serving.chat_task import ChatTask, ToolUse, prepare, tool_use
from penstock.serving.errors import invalid
from penstock.serving.model_formats import ModelFormats
from penstock.serving.responses.items import Item, chat_messages, read_items
from penstock.serving.sampling_fields import MAX_INT, SamplingFields, check_limit
from penstock.serving.settings import ServingSettings
from penstock.serving.structure_fields import VllmStructureFields
from penstock.structured_outputs import StructuredOutputs

LOGPROBS = "message.output_text.logprobs"
MAX_TOP_LOGPROBS = 20
_UNSUPPORTED = {
    "background": "background mode is not supported: leave it out, and stream",
    "conversation": "conversations are not supported: use previous_response_id",
    "prompt": "stored prompts are not supported: pass instructions and input",
}

MetadataValue = Annotated[str, Field(max_length=512)]
MetadataKey = Annotated[str, Field(max_length=64)]


class Reasoning(RequestModel):
    """How much the model reasons. The effort is given to the chat template."""

    effort: str | None = None
    summary: str | None = None


class TextFormat(RequestModel):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    json_schema: dict[str, object] | None = Field(None, alias="schema")
    strict: bool | None = None
    description: str | None = None


class TextConfig(RequestModel):
    """The form of the answer; its verbosity is up to the model."""

    format: TextFormat | None = None
    verbosity: str | None = None


class InputTokensRequest(TemplateFields, VllmStructureFields):
    """A conversation."""

    input: str | Listed[dict[str, object]] | None = None
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    tools: Listed[dict[str, object]] | None = None
    tool_choice: str | dict[str, object] | None = None
    parallel_tool_calls: bool | None = True
    truncation: Literal["auto", "disabled"] | None = None
    background: bool | None = None
    conversation: object = None
    prompt: object = None

    @property
    def num_reserved(self) -> int:
        """The number of tokens to leave for the answer when the conversation is truncated."""
        return 1

    def items(self) -> list[Item]:
        """The items of the input. Raises `HttpError`."""
        for name, text in _UNSUPPORTED.items():
            if getattr(self, name):
                raise invalid(text, name)
        if self.input is None or not self.input:
            raise invalid("input is missing: pass a text or a list of items", "input", "missing_required_parameter")
        return read_items(self.input)

    def chat_task(
        self, items: Sequence[Item], settings: ServingSettings, formats: ModelFormats, params: SamplingParams
    ) -> ChatTask:
        """The conversation as the engine takes it. Raises `HttpError`, `RequestError`."""
        check_limit("input", len(items), settings.max_messages, "items")
        template, use, structure = self._template(), self._tool_use(settings), self._structure()
        prompt = template.chat(chat_messages(self.instructions, items))
        return prepare(prompt, params, formats, use=use, structure=structure, thinks=template.thinks)

    def _tool_use(self, settings: ServingSettings) -> ToolUse:
        is_parallel = self.parallel_tool_calls is not False
        return tool_use(self.tools, self.tool_choice, is_parallel=is_parallel, max_tools=settings.max_tools)

    def _template(self) -> TemplateFields:
        """How the chat is rendered."""
        arguments = dict(self.chat_template_kwargs or {})
        effort = self.reasoning.effort if self.reasoning is not None else None
        values = {name: getattr(self, name) for name in TemplateFields.model_fields}
        values |= {"chat_template_kwargs": arguments, "reasoning_effort": effort or self.reasoning_effort}
        return TemplateFields.model_validate(values)

    def _structure(self) -> StructuredOutputs | None:
        return self.structure_beside(self._from_format(), "text.format")

    def _from_format(self) -> StructuredOutputs | None:
        form = None if self.text is None else self.text.format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return StructuredOutputs(json_object=True)
        if form.json_schema is None:
            raise invalid("text.format.schema is missing", "text.format.schema")
        return StructuredOutputs(json=form.json_schema)


class ResponsesRequest(InputTokensRequest, SamplingFields):
    """A response to create."""

    store: bool | None = True
    stream: bool | None = False
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    max_tool_calls: int | None = Field(None, ge=0, le=MAX_INT)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    include: Listed[str] | None = None
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def num_reserved(self) -> int:
        """The number of tokens to leave for the answer when the conversation is truncated."""
        return self.max_output_tokens or 1

    @property
    def has_logprobs(self) -> bool:
        """Whether the log probabilities of the content are returned."""
        return LOGPROBS in (self.include or ())

    def task(
        self, items: Sequence[Item], settings: ServingSettings, formats: ModelFormats, base: SamplingParams | None
    ) -> ChatTask:
        """The conversation and its parameters; `base` has the model's. Raises `HttpError`, `RequestError`."""
        if max(self.n or 1, self.best_of or 1) > 1:
            raise invalid("this API answers with one response: leave n and best_of out", "n")
        if self.has_logprobs and self.tools:
            raise invalid("log probabilities exclude tools: leave one of them out", "include")
        logprobs = (self.top_logprobs or 0) if self.has_logprobs else None
        params = self.params(settings, base=base, max_tokens=self.max_output_tokens, logprobs=logprobs)
        return self.chat_task(items, settings, formats, params)
