"""`RemoteApiInferenceServiceClient`: a service client over a service holder: Tinker, Weaver, or a local engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from penstock.backends.services.client import InferenceServiceClient
from penstock.backends.services.openai_style import Messages
from penstock.backends.services.records import Json
from penstock.backends.services.remote_call import pop_tools, read_call
from penstock.backends.services.responses import chat_response, text_response
from penstock.backends.services.service_config import ServiceConfig, read_config
from penstock.backends.services.templates import with_arguments_as_objects
from penstock.backends.services.tinker_holder import TinkerServiceHolder
from penstock.backends.services.weaver_holder import WeaverServiceHolder
from penstock.errors import ConfigurationError, shown


@runtime_checkable
class Sampler(Protocol):
    """A service holder, of this package or of the program."""

    def sample_from_prompt(self, prompt: str, max_tokens: int, temperature: float, num_samples: int) -> Json: ...

    def sample_from_messages(
        self, messages: Messages, max_tokens: int, temperature: float, num_samples: int, tools: Any
    ) -> Json: ...


class RemoteApiInferenceServiceClient(InferenceServiceClient):
    """A client of the service that a holder holds. Values of a call take precedence over those of the config.

    Without `set_service_holder`, the first call makes the holder that `inference_service.backend` names ("tinker" or
    "weaver") for `base_url` and `model`. A call takes `max_tokens`, `temperature`, `n`, `stop`, `top_p`, `top_k`,
    `seed` and `tools`; others are refused with a `RequestError` that names them.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = read_config(config)
        self.freeze_for_weight_sync = self.config.freeze_for_weight_sync
        self._model_tag = self.config.tag
        self._service_holder: Any = None
        self._own_holder: TinkerServiceHolder | WeaverServiceHolder | None = None

    def set_service_holder(self, service_holder: Any) -> None:
        """Set the holder: a `ServiceHolder`, or any object with its two sampling methods."""
        if not isinstance(service_holder, Sampler):
            raise ConfigurationError(f"{shown(service_holder)} has no sample_from_prompt and sample_from_messages")
        self._service_holder = service_holder

    def completion(self, prompt: str, **kwargs: Any) -> Json:
        """Complete a prompt: see `InferenceServiceClient.completion`."""
        call, holder = read_call(kwargs, self.config), self._holder()
        with self._in_service() as version:
            result = holder.sample_from_prompt(prompt=prompt, **call)
        return self._format_as_openai_response(result, version=version)

    async def acompletion(self, prompt: str, **kwargs: Any) -> Json:
        """`completion` for event loops."""
        call, holder = read_call(kwargs, self.config), self._holder()
        async with self._ain_service() as version:
            result = await _twin(holder, "sample_from_prompt", prompt=prompt, **call)
        return self._format_as_openai_response(result, version=version)

    def generate(self, messages: Messages, **kwargs: Any) -> Json:
        """Answer a chat: see `InferenceServiceClient.generate`."""
        tools, call, holder = pop_tools(kwargs), read_call(kwargs, self.config), self._holder()
        with self._in_service() as version:
            result = holder.sample_from_messages(messages=self._messages(messages), tools=tools, **call)
        return self._format_as_openai_response(result, is_chat=True, version=version)

    async def agenerate(self, messages: Messages, **kwargs: Any) -> Json:
        """`generate` for event loops."""
        tools, call, holder = pop_tools(kwargs), read_call(kwargs, self.config), self._holder()
        async with self._ain_service() as version:
            messages = self._messages(messages)
            result = await _twin(holder, "sample_from_messages", messages=messages, tools=tools, **call)
        return self._format_as_openai_response(result, is_chat=True, version=version)

    def apply_chat_template(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
    ) -> str | list[int]:
        """The prompt of a chat, by the tokenizer of the service."""
        prompt: str | list[int] = self._holder().apply_chat_template(
            self._messages(messages), tools, add_generation_prompt=add_generation_prompt, tokenize=tokenize
        )
        return prompt

    def close(self) -> None:
        """End the session of the holder that this client made; one that was set is its owner's to close."""
        if self._own_holder is not None:
            self._own_holder.close()

    def _messages(self, messages: Messages) -> Messages:
        return with_arguments_as_objects(messages) if self.config.parse_tool_call_arguments else messages

    def _holder(self) -> Any:
        if self._service_holder is None:
            self._service_holder = self._own_holder = _new_holder(self.config)
        return self._service_holder

    def _format_as_openai_response(self, result: Json, *, is_chat: bool = False, version: int | None = None) -> Json:
        """The result of a holder in the shape of OpenAI's API: a choice for each sample, with its record."""
        build = chat_response if is_chat else text_response
        return build(self.config.model, result.get("samples") or [result], version)


async def _twin(holder: Any, name: str, **arguments: Any) -> Json:
    """The result of a method's twin for event loops, or of the method itself on a thread."""
    twin = getattr(holder, f"a{name}", None)
    result: Json = await (twin(**arguments) if twin else asyncio.to_thread(getattr(holder, name), **arguments))
    return result


def _new_holder(config: ServiceConfig) -> TinkerServiceHolder | WeaverServiceHolder:
    if config.backend not in ("tinker", "weaver"):
        raise ConfigurationError(
            f'backend {shown(config.backend)} has no holder: set "tinker" or "weaver", or call set_service_holder'
        )
    kind = TinkerServiceHolder if config.backend == "tinker" else WeaverServiceHolder
    return kind(
        config.model,
        base_url=config.base_url or None,
        tokenizer_path=config.tokenizer or None,
        tool_parser=config.tool_parser,
        reasoning_parser=config.reasoning_parser,
    )
