"""The arguments of one call of the `openai` package: what the caller gave, the config's defaults, and what RL needs.

Built once per call, so every repetition sends the same. The caller's objects are not changed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.backends.services.openai_style import Messages
from penstock.backends.services.records import Json
from penstock.backends.services.service_config import ServiceConfig
from penstock.errors import RequestError

# Token ids, under the names that vLLM, SGLang and Penstock know; servers ignore what they do not know.
_WITH_IDS: Json = {"return_tokens_as_token_ids": True, "return_token_ids": True}
# The text of a completion is everything that was sampled. `no_stop_trim` is SGLang's name.
_UNTRIMMED: Json = {"include_stop_str_in_output": True, "no_stop_trim": True, "skip_special_tokens": False}


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of `create`, and the prompt that they mean."""

    arguments: Json
    is_chat: bool

    @property
    def tools(self) -> Any:
        """The tools that the model may call, or None."""
        return None if self.arguments.get("tool_choice") == "none" else self.arguments.get("tools")


def text_call(config: ServiceConfig, prompt: str | Sequence[int], options: Mapping[str, Any]) -> Call:
    """A text completion. Raises `RequestError` for a stream."""
    arguments = _arguments(config, options, "completions", _WITH_IDS | _UNTRIMMED)
    arguments["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
    if config.train_record:
        arguments["logprobs"] = max(1, int(arguments.get("logprobs") or 1))
    return Call(arguments, is_chat=False)


def chat_call(config: ServiceConfig, messages: Messages, options: Mapping[str, Any]) -> Call:
    """A chat completion. Raises `RequestError` for a stream."""
    arguments = _arguments(config, options, "chat.completions", _WITH_IDS)
    arguments["messages"] = list(messages)
    if config.train_record:
        arguments["logprobs"] = True
    return Call(arguments, is_chat=True)


def _arguments(config: ServiceConfig, options: Mapping[str, Any], resource: str, extensions: Json) -> Json:
    chosen = {name: value for name, value in options.items() if value is not None}
    if chosen.pop("stream", False):
        raise RequestError("stream is not supported by service clients: iterate over an engine's handle instead")
    known = _parameters(resource)
    extra = {name: chosen.pop(name) for name in sorted(chosen.keys() - known)}
    extra |= chosen.pop("extra_body", {})
    defaults: Json = {"temperature": config.temperature}
    if "max_completion_tokens" not in chosen:
        defaults["max_tokens"] = config.max_tokens
    body = (extensions if config.train_record else {}) | extra
    return {**defaults, **chosen, "model": config.model, **({"extra_body": body} if body else {})}


@functools.cache
def _parameters(resource: str) -> frozenset[str]:
    """The parameters of `create` that the `openai` package knows."""
    from openai.resources.chat.completions import Completions as ChatCompletions
    from openai.resources.completions import Completions

    create: Callable[..., object] = Completions.create if resource == "completions" else ChatCompletions.create
    return frozenset(inspect.signature(create).parameters) - {"self"}
