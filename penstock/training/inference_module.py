"""`InferenceModule`: what an environment, a rollout manager and a loss need of a model, by one blocking interface.

Owns the cache of responses and the format of tool calls. Generation and scores are the backend's, which it never
bypasses. Every method may be called from any thread; requests of all threads run in one batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from penstock.api.prompt import as_batch
from penstock.api.weights import UpdateMode
from penstock.cache.responses import ResponseCache, Unfreezable, frozen
from penstock.config import ALIASES, EngineConfig
from penstock.errors import ConfigurationError, shown
from penstock.tools import FORMATS, ToolCall, ToolCallParser, format_named, tool_format_of
from penstock.training.backend import InferenceBackend, Prompts, Responses, Tensor
from penstock.training.huggingface import HuggingFaceBackend
from penstock.training.parameters import is_repeatable
from penstock.training.results import GenerationResult
from penstock.training.sglang import SGLangBackend
from penstock.training.tool_prompts import read_available_tools, with_tools
from penstock.training.vllm import VLLMBackend, best_backend
from penstock.values import integer, nearest

DEFAULT_CACHE_SIZE = 1000
BACKENDS: Mapping[str, Callable[..., InferenceBackend]] = {
    "huggingface": HuggingFaceBackend,
    "vllm": VLLMBackend,
    "sglang": SGLangBackend,
}


@dataclass(frozen=True, slots=True)
class _Key:
    """What a result depends on; the name of an adapter is one of the options."""

    weight_version: int
    adapter_generation: int
    prompts: Hashable
    options: Hashable


class InferenceModule:
    """Generates with a model, and computes logits and log probabilities of responses, for reinforcement learning.

    `model_name` and `backend_kwargs` are the backend's arguments; `backend` is a name in `BACKENDS`, or a backend that
    exists already. `tool_parser` is the format of tool calls: a name in `penstock.tools.FORMATS`, or "auto" for that of
    the chat template.

    `generation_cache` keeps up to `cache_size` results (1000), of greedy and seeded calls. Sampled calls are cached if
    `cache_size` is given: the same call then returns the same samples every time, which no training wants. The use of
    the cache in one call is decided by `use_cache`. Raises `ConfigurationError`.
    """

    def __init__(
        self,
        model_name: object = None,
        backend: str | InferenceBackend = "huggingface",
        cache_size: int | None = None,
        tool_parser: str = "json",
        **backend_kwargs: Any,
    ) -> None:
        size = DEFAULT_CACHE_SIZE if cache_size is None else integer("cache_size", cache_size, 0)
        self._tool_format = None if tool_parser == "auto" else format_named(tool_parser).name
        self._caches_samples = cache_size is not None
        self.generation_cache: ResponseCache[GenerationResult] = ResponseCache(size, GenerationResult.copy)
        self.backend: Any = _backend(model_name, backend, backend_kwargs)

    def generate(self, prompts: Prompts, use_cache: bool | None = None, **options: Any) -> GenerationResult:
        """Completions of one prompt (a string, token ids, chat messages) or of a list of prompts. Blocks.

        `options` are those of the backend: `max_new_tokens=256`, `temperature=1.0`, `top_p=1.0`, `top_k=-1`,
        `do_sample=True`, `num_return_sequences=1`, `return_logits=False`, `return_logprobs=False`, `adapter`, `seed`,
        `stop` and all other fields of `SamplingParams`. `use_cache=False` neither reads nor fills the cache,
        `use_cache=True` does both also for samples. Results with logits are never cached. Raises what the backend
        raises.
        """
        key = self._key(prompts, use_cache, options)
        result = None if key is None else self.generation_cache.get(key)
        if result is None:
            result = self.backend.generate(prompts, **options)
            self._keep(key, result, options)
        return result

    async def agenerate(self, prompts: Prompts, use_cache: bool | None = None, **options: Any) -> GenerationResult:
        """`generate` without blocking the event loop; cancelling it cancels its requests."""
        key = self._key(prompts, use_cache, options)
        result = None if key is None else self.generation_cache.get(key)
        if result is None:
            result = await self.backend.agenerate(prompts, **options)
            self._keep(key, result, options)
        return result

    def get_logits(
        self, prompts: Prompts, responses: Responses, *, return_mask: bool = False, adapter: str = ""
    ) -> Tensor:
        """Raw logits before each token of each response: float32 [responses, longest response, vocab].

        Responses are texts or token ids (`result.token_ids`); a text is encoded apart from its prompt, without special
        tokens, and may have other tokens than those that were sampled. Behind a response's end, values are 0.0;
        with `return_mask`, the result is a pair with a bool tensor [responses, longest] that is False there. `adapter`
        is the name of a loaded one.
        """
        return self.backend.get_logits(prompts, responses, return_mask=return_mask, **_named(adapter))

    def get_logprobs(
        self, prompts: Prompts, responses: Responses, *, return_mask: bool = False, adapter: str = ""
    ) -> Tensor:
        """The model's log probability of each token of each response: float32 [responses, longest response].

        Arguments, padding and mask are those of `get_logits`.
        """
        return self.backend.get_logprobs(prompts, responses, return_mask=return_mask, **_named(adapter))

    async def aget_logits(
        self, prompts: Prompts, responses: Responses, *, return_mask: bool = False, adapter: str = ""
    ) -> Tensor:
        """`get_logits` without blocking the event loop."""
        return await self.backend.aget_logits(prompts, responses, return_mask=return_mask, **_named(adapter))

    async def aget_logprobs(
        self, prompts: Prompts, responses: Responses, *, return_mask: bool = False, adapter: str = ""
    ) -> Tensor:
        """`get_logprobs` without blocking the event loop."""
        return await self.backend.aget_logprobs(prompts, responses, return_mask=return_mask, **_named(adapter))

    def batch_generate_with_tools(
        self,
        prompts: Prompts,
        available_tools: Sequence[object] | None = None,
        max_new_tokens: int = 512,
        **options: Any,
    ) -> tuple[GenerationResult, list[list[ToolCall]]]:
        """`generate` for prompts that are told of tools, and the calls in each row of the result.

        Tools are mappings as `penstock.tools.read_tools` takes them, or names. Malformed calls are text. A text becomes
        a user's message if the model has a chat template.
        """
        tools = read_available_tools(available_tools)
        format = self.tool_format
        batch = [with_tools(prompt, tools, format, self.backend.chat_template) for prompt in as_batch(prompts)]
        if FORMATS[format].special_tokens:
            options.setdefault("skip_special_tokens", False)
        result = self.generate(batch, max_new_tokens=max_new_tokens, **options)
        parser = ToolCallParser(format, tools)
        return result, [parser.parse(text) for text in result.texts]

    def generate_with_tools(
        self, prompts: Prompts, available_tools: Sequence[object] | None = None, **options: Any
    ) -> tuple[GenerationResult, list[list[ToolCall]]]:
        """`batch_generate_with_tools`."""
        return self.batch_generate_with_tools(prompts, available_tools, **options)

    def parse_tool_calls(self, text: str) -> list[ToolCall]:
        """The tool calls in a text, in the format of this module."""
        return ToolCallParser(self.tool_format).parse(text)

    @property
    def tool_format(self) -> str:
        """The format in which tool calls are requested and read."""
        return self._tool_format or tool_format_of(self.backend.chat_template)

    def updating(self, mode: UpdateMode = "abort") -> AbstractContextManager[None]:
        """A block for a change of the weights: `with inference.updating(): optimizer.step()`.

        `mode` says what becomes of requests of other threads: "abort", "wait" or "keep" (`InferenceEngine.updating`).
        No result and no K/V of the old weights is returned afterwards. Raises what the engine raises.
        """
        updating: AbstractContextManager[None] = self.backend.updating(mode)
        return updating

    def load_adapter(self, name: str, source: object) -> None:
        """Load a LoRA adapter, or replace it, for calls with `adapter=name`; see `InferenceEngine.load_adapter`."""
        self.backend.load_adapter(name, source)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises `RequestError` for an unknown name."""
        self.backend.unload_adapter(name)

    def clear_cache(self) -> None:
        """Drop all cached results, and whatever the backend computed; needed after a change outside of `updating`."""
        self.generation_cache.clear()
        self.backend.clear_cache()

    def close(self) -> None:
        """Free the model. Also happens when the module is dropped."""
        self.backend.close()

    def __repr__(self) -> str:
        return f"<InferenceModule over {type(self.backend).__name__}, {self.generation_cache!r}>"

    def _key(self, prompts: Prompts, use_cache: bool | None, options: Mapping[str, Any]) -> _Key | None:
        """The key of the result; None if it is not to be cached."""
        if use_cache is None:
            use_cache = self._caches_samples or is_repeatable(options)
        if not use_cache or options.get("return_logits"):
            return None
        try:
            frozen_options = frozen(dict(sorted(options.items())))
            return _Key(*self._versions(options), frozen(as_batch(prompts)), frozen_options)
        except Unfreezable:
            return None

    def _keep(self, key: _Key | None, result: GenerationResult, options: Mapping[str, Any]) -> None:
        """Cache a result, unless weights or adapter were updated while it was generated."""
        if key is not None and (key.weight_version, key.adapter_generation) == self._versions(options):
            self.generation_cache.put(key, result)

    def _versions(self, options: Mapping[str, Any]) -> tuple[int, int]:
        """The versions of the weights and of the adapter that a call with these options runs with."""
        adapter = options.get("adapter")
        return self.backend.weight_version, self.backend.adapter_generation(adapter) if adapter else 0


def create_inference_module(model_name: object = None, backend: str = "auto", **options: Any) -> InferenceModule:
    """An `InferenceModule`; with `backend="auto"` over vLLM or this package's own engine (`best_backend`).

    Raises `ConfigurationError`.
    """
    return InferenceModule(model_name, best_backend(model_name, options) if backend == "auto" else backend, **options)


def _named(adapter: str) -> dict[str, str]:
    """The adapter as an option, which backends of programs need not know."""
    return {"adapter": adapter} if adapter else {}


def _backend(model_name: object, backend: str | InferenceBackend, options: Mapping[str, Any]) -> InferenceBackend:
    if isinstance(backend, InferenceBackend):
        if model_name is not None or options:
            raise ConfigurationError("a backend that exists already takes no model and no settings: leave them out")
        return backend
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ConfigurationError(f"there is no backend {shown(backend)}: use {', '.join(map(repr, BACKENDS))}")
    _check_names(backend, options)
    return BACKENDS[backend](model_name, **options)


def _check_names(backend: str, options: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` for the name of an argument that only looks like one, as far as it is known here."""
    arguments = (*inspect.signature(InferenceModule).parameters, *inspect.signature(HuggingFaceBackend).parameters)
    names = {*arguments, *EngineConfig.model_fields, *ALIASES}
    # vLLM and SGLang check their options when they start.
    unknown = options.keys() - names if backend == "huggingface" else options.keys() & {"model"}
    if unknown:
        hint = nearest(min(unknown), names | {"model"}).replace("'model'", "'model_name'")
        raise ConfigurationError(f"unknown setting {min(unknown)!r}{hint}")
