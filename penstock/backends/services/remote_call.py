"""The arguments of a call in OpenAI's names as a service holder takes them. What it cannot do is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.backends.services.service_config import ServiceConfig
from penstock.errors import RequestError, shown
from penstock.tools import read_tool_choice, read_tools
from penstock.values import integer, real

_SAMPLING = ("top_p", "top_k", "seed", "stop")
# What every response has, or what has no meaning for a service that is not a server of text.
_IMPLIED = frozenset(
    {
        *("model", "logprobs", "include_stop_str_in_output", "no_stop_trim", "return_tokens_as_token_ids"),
        *("return_token_ids", "skip_special_tokens", "user", "metadata", "timeout", "tool_choice"),
    }
)
_NAMES = {"max_completion_tokens": "max_tokens", "num_samples": "n"}


def read_call(arguments: Mapping[str, Any], config: ServiceConfig) -> dict[str, Any]:
    """The arguments of a holder's sampling method, but for the prompt; `config` has the defaults.

    Raises `RequestError` for what a holder cannot do.
    """
    values = _merged(arguments)
    call: dict[str, Any] = {
        "max_tokens": integer("max_tokens", values.pop("max_tokens", config.max_tokens), 1),
        "temperature": real("temperature", values.pop("temperature", config.temperature), 0.0, 100.0, "a number >= 0"),
        "num_samples": integer("n", values.pop("n", 1), 1),
    }
    call |= {name: values.pop(name) for name in _SAMPLING if name in values}
    if unknown := sorted(values.keys() - _IMPLIED):
        raise RequestError(f"{unknown[0]} is not known to this service: leave it out")
    return call


def pop_tools(arguments: dict[str, Any]) -> list[dict[str, object]] | None:
    """Take the tools out of a call's arguments: those that the model may call, or None without any.

    Raises `RequestError` for a `tool_choice` that would have to be enforced.
    """
    tools, choice = read_tools(arguments.pop("tools", None)), arguments.get("tool_choice")
    mode = read_tool_choice(choice, tools).mode
    if mode in ("required", "named"):
        raise RequestError(f'tool_choice {shown(choice)} cannot be enforced by this service: use "auto" or "none"')
    return [tool.to_dict() for tool in tools] if tools and mode == "auto" else None


def _merged(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments and those in `extra_body`, under one name each, without values of None. Refuses a stream."""
    extra = arguments.get("extra_body") or {}
    values = {**{name: value for name, value in arguments.items() if name != "extra_body"}, **extra}
    if values.pop("stream", None):
        raise RequestError("stream is not supported by service clients: iterate over an engine's handle instead")
    return {_NAMES.get(name, name): value for name, value in values.items() if value is not None}
