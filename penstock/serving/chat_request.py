"""The body of `/v1/chat/completions`, and the prompt and parameters that it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from penstock.sampling import SamplingParams
from penstock.serving.body import Listed, RequestModel
from penstock.serving.chat_task import ChatPrompt, ChatTask, prepare, tool_use
from penstock.serving.chunks import StreamOptions
from penstock.serving.errors import invalid
from penstock.serving.messages import plain_messages
from penstock.serving.model_formats import ModelFormats
from penstock.serving.sampling_fields import MAX_INT, SamplingFields, check_limit
from penstock.serving.settings import ServingSettings
from penstock.serving.structure_fields import StructureFields

# Variables of the template that would replace it or what the engine does with it.
_REFUSED_ARGUMENTS = frozenset({"chat_template", "tokenize", "messages", "tools", "documents"})


class TemplateFields(RequestModel):
    """How a chat is rendered."""

    documents: Listed[dict[str, object]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None
    reasoning_effort: str | None = None
    chat_template: object = None

    def chat(self, messages: Sequence[Mapping[str, object]], tools: Sequence[object] | None = None) -> ChatPrompt:
        """The chat as the engine takes it. Raises `HttpError`."""
        arguments = dict(self.chat_template_kwargs or {})
        if refused := _REFUSED_ARGUMENTS & set(arguments):
            raise invalid(f"chat_template_kwargs cannot set {min(refused)!r}", "chat_template_kwargs")
        if self.chat_template is not None:
            raise invalid("requests cannot bring a chat_template: the model's own is used", "chat_template")
        if self.reasoning_effort is not None:
            arguments.setdefault("reasoning_effort", self.reasoning_effort)
            arguments.setdefault("enable_thinking", self.reasoning_effort != "none")
        optional: Mapping[str, object] = {
            "tools": tools,
            "documents": self.documents,
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self._continues(),
            "chat_template_kwargs": arguments,
        }
        prompt: dict[str, object] = {"messages": plain_messages(messages)}
        return prompt | {name: value for name, value in optional.items() if value is not None and value != {}}

    @property
    def thinks(self) -> bool:
        """Whether the model may reason, under the names that templates have for it."""
        arguments = self.chat_template_kwargs or {}
        is_off = any(arguments.get(name) is False for name in ("enable_thinking", "thinking"))
        return not is_off and self.reasoning_effort != "none"

    def _continues(self) -> bool | None:
        """None leaves it to the last message's role."""
        if self.continue_final_message is None and self.add_generation_prompt:
            return False
        return self.continue_final_message


class ChatRequest(SamplingFields, TemplateFields, StructureFields):
    """A chat completion."""

    messages: Listed[dict[str, object]] = Field(min_length=1)
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    modalities: Listed[str] | None = None
    audio: dict[str, object] | None = None
    functions: Listed[dict[str, object]] | None = None
    tools: Listed[dict[str, object]] | None = None
    tool_choice: str | dict[str, object] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_INT)
    user: str | None = None
    metadata: dict[str, object] | None = None

    def check(self, settings: ServingSettings) -> None:
        """Refuse what no engine could run. Raises `HttpError`."""
        check_limit("messages", len(self.messages), settings.max_messages, "messages")
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise invalid("best_of above n cannot be streamed: all candidates must end first", "best_of")
        if self.functions:
            raise invalid("functions were replaced by tools: pass tools and tool_choice", "functions")
        if self.audio is not None or "audio" in (self.modalities or ()):
            raise invalid("this model writes text only: leave out audio", "audio")
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")

    def task(self, settings: ServingSettings, formats: ModelFormats, base: SamplingParams | None = None) -> ChatTask:
        """The chat as the engine takes it; `base` has the model's parameters. Raises `HttpError`, `RequestError`."""
        use = tool_use(
            *(self.tools, self.tool_choice),
            is_parallel=self.parallel_tool_calls is not False,
            max_tools=settings.max_tools,
        )
        params, structure = self.sampling(settings, base), self.structure()
        return prepare(self.chat(self.messages), params, formats, use=use, structure=structure, thinks=self.thinks)

    def sampling(self, settings: ServingSettings, base: SamplingParams | None = None) -> SamplingParams:
        """The engine's parameters. Raises `HttpError`, `RequestError`."""
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.params(settings, base=base, max_tokens=max_tokens, logprobs=logprobs)
