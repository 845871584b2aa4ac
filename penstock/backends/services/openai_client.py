"""`OpenAIInferenceServiceClient`: a service client of any OpenAI-compatible server (Penstock, vLLM, SGLang, OpenAI).

Requests are built once and repeated unchanged by the `openai` package, which waits longer and longer, at random, and
never repeats what the server refused. The training record comes from the ids that the server returns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from penstock.backends.addresses import api_url
from penstock.backends.services.client import InferenceServiceClient
from penstock.backends.services.hf_tokenizer import Tokenizer, shared_tokenizer
from penstock.backends.services.openai_answer import AnswerReader
from penstock.backends.services.openai_call import Call, chat_call, text_call
from penstock.backends.services.openai_style import Messages
from penstock.backends.services.records import Json
from penstock.backends.services.service_config import read_config
from penstock.backends.services.templates import render_chat, with_arguments_as_objects
from penstock.errors import ConfigurationError

TIMEOUT_S = 1000.0
_BACKENDS = ("openai", "vllm", "sglang")


class OpenAIInferenceServiceClient(InferenceServiceClient):
    """A client of the server at `inference_service.base_url`. Values of a call take precedence over the config's.

    A call takes every argument of the API, and sends those that the `openai` package does not know as extensions
    (`top_k`, `min_p`). The model is always that of the config. With `tool_parser`, tool calls are parsed here if the
    server has not done so. Raises `ConfigurationError`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        import openai  # of the extra `client`

        self.config = read_config(config)
        if self.config.backend not in _BACKENDS:
            raise ConfigurationError(
                f"backend {self.config.backend!r} has no OpenAI-compatible API: use create_inference_service_client"
            )
        self.freeze_for_weight_sync = self.config.freeze_for_weight_sync
        self._model_tag = self.config.tag
        self._url = api_url(self.config.base_url or "http://localhost:8000")
        self._options: dict[str, Any] = {
            "api_key": self.config.api_key or "EMPTY",
            "base_url": self._url,
            "timeout": TIMEOUT_S,
            "max_retries": self.config.max_retries,
        }
        self._oai_llm = openai.OpenAI(**self._options)
        # Connections belong to the event loop that opened them.
        self._async_llms: dict[asyncio.AbstractEventLoop, openai.AsyncOpenAI] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer at `inference_service.tokenizer`, or of the model's name; loaded on first use."""
        return shared_tokenizer(self.config.tokenizer_path)

    def completion(self, prompt: str | Sequence[int], **kwargs: Any) -> Json:
        """Complete a prompt: see `InferenceServiceClient.completion`."""
        call = text_call(self.config, prompt, kwargs)
        with self._in_service() as version, _errors(self._url):
            response = self._oai_llm.completions.create(**call.arguments)
        return self._read(call, response, version)

    async def acompletion(self, prompt: str | Sequence[int], **kwargs: Any) -> Json:
        """`completion` for event loops. A cancelled call closes its connection, which ends it on the server."""
        call = text_call(self.config, prompt, kwargs)
        async with self._ain_service() as version:
            with _errors(self._url):
                response = await self._async_llm().completions.create(**call.arguments)
        return await self._aread(call, response, version)

    def generate(self, messages: Messages, **kwargs: Any) -> Json:
        """Answer a chat: see `InferenceServiceClient.generate`."""
        call = chat_call(self.config, messages, kwargs)
        with self._in_service() as version, _errors(self._url):
            response = self._oai_llm.chat.completions.create(**call.arguments)
        return self._read(call, response, version)

    async def agenerate(self, messages: Messages, **kwargs: Any) -> Json:
        """`generate` for event loops. A cancelled call closes its connection, which ends it on the server."""
        call = chat_call(self.config, messages, kwargs)
        async with self._ain_service() as version:
            with _errors(self._url):
                response = await self._async_llm().chat.completions.create(**call.arguments)
        return await self._aread(call, response, version)

    def apply_chat_template(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
    ) -> str | list[int]:
        """The prompt of a chat, by the tokenizer on this side."""
        plain = with_arguments_as_objects(messages) if self.config.parse_tool_call_arguments else messages
        options = {"add_generation_prompt": add_generation_prompt}
        return render_chat(self.tokenizer, plain, tools, tokenize=tokenize, **options)

    def close(self) -> None:
        """Close the connections of the calls that block."""
        self._oai_llm.close()

    async def aclose(self) -> None:
        """Close the connections of the running event loop, and those of the calls that block."""
        client = self._async_llms.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()
        self.close()

    def _async_llm(self) -> Any:
        import openai

        loop = asyncio.get_running_loop()
        client = self._async_llms.get(loop)
        if client is None:
            for closed in [other for other in list(self._async_llms) if other.is_closed()]:
                self._async_llms.pop(closed, None)
            client = self._async_llms[loop] = openai.AsyncOpenAI(**self._options)
        return client

    def _read(self, call: Call, response: Any, version: int | None) -> Json:
        return AnswerReader(self.config, lambda: self.tokenizer).read(call, response.model_dump(), version)

    async def _aread(self, call: Call, response: Any, version: int | None) -> Json:
        if self.config.tool_parser is None:
            return self._read(call, response, version)
        return await asyncio.to_thread(self._read, call, response, version)  # may load a tokenizer


@contextmanager
def _errors(url: str) -> Iterator[None]:
    """The package's errors for those of the `openai` package."""
    import openai

    from penstock.backends.openai_errors import penstock_error

    try:
        yield
    except openai.OpenAIError as error:
        raise penstock_error(error, url) from error
