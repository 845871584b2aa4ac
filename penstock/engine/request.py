"""`Request`: the engine's own record of one call to `generate`, from the door to its terminal event.

Made on the caller's thread, handed over once, then touched by the engine's thread alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from penstock.engine.channel import Channel
from penstock.engine.collector import Collector
from penstock.engine.tokenizing import Prompt, check_keys, encode_prompt, needs_tokenizer
from penstock.errors import RequestError
from penstock.sampling import GenerationConfig, RequestPriority, SamplingParams
from penstock.sequence import Sequence

Params = SamplingParams | GenerationConfig | None


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """Times are seconds on the engine's clock; `reserved_tokens` is what the door counted for the prompt."""

    id: str
    prompt: Prompt
    params: Params
    channel: Channel
    arrival: float
    priority: RequestPriority = RequestPriority.NORMAL
    deadline: float = math.inf
    ttft_deadline: float = math.inf
    namespace: str = ""
    reserved_tokens: int = 0
    seed: int = 0  # drawn at submission, for parameters that bring none
    admitted: bool = False  # whether the door's reservation was given back
    collector: Collector | None = None
    sequences: list[Sequence] = field(default_factory=list)
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None


def taken(prompt: Prompt) -> Prompt:
    """The prompt as it is now, whatever the caller does to it later, refused if it needs no tokenizer to be refused.

    Raises `RequestError`.
    """
    if isinstance(prompt, Mapping):
        check_keys(prompt)
    if not needs_tokenizer(prompt):
        text, ids = encode_prompt(None, prompt)
        return {"prompt": text, "prompt_token_ids": ids}
    if not (prompt.get("prompt") if isinstance(prompt, Mapping) else prompt):
        raise RequestError("the prompt is empty: pass at least one character, or token ids")
    return prompt if isinstance(prompt, str) else copy.deepcopy(prompt)


def estimate_tokens(prompt: Prompt) -> int:
    """About how many tokens a prompt has: exact for ids, a quarter of the characters for text."""
    if isinstance(prompt, str):
        return len(prompt) // 4 + 1
    if isinstance(prompt, Mapping):
        return estimate_tokens(prompt["prompt_token_ids" if "prompt_token_ids" in prompt else "prompt"])
    if needs_tokenizer(prompt):
        return sum(len(str(message)) for message in prompt) // 4 + 1
    return len(prompt)


def check_params(params: Params) -> None:
    """Raises `RequestError` for anything but parameters."""
    if params is not None and not isinstance(params, SamplingParams | GenerationConfig):
        raise RequestError(f"params must be SamplingParams or GenerationConfig, got {type(params).__name__}")


def priority_class(priority: RequestPriority) -> RequestPriority:
    """The class of that number. Raises `RequestError`."""
    try:
        return RequestPriority(priority)
    except ValueError:
        names = ", ".join(known.name for known in RequestPriority)
        raise RequestError(f"priority must be a RequestPriority ({names}), got {priority!r}") from None


def seconds(name: str, value: float) -> float:
    """The number. A time that has passed already is a deadline that is missed, not a mistake. Raises `RequestError`."""
    if not isinstance(value, int | float) or value != value:
        raise RequestError(f"{name} must be seconds from now, got {value!r}")
    return value
