"""`Request`: the engine's own record of one call to `generate`, from the door to its terminal event.

Made on the caller's thread, handed over once, then touched by the engine's thread alone.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from penstock.engine.channel import Channel
from penstock.engine.collector import Collector
from penstock.engine.tokenizing import Prompt, check_keys, encode_prompt, needs_tokenizer
from penstock.errors import RequestError
from penstock.generation import GenerationConfig
from penstock.optimizers.beams import BeamSearch
from penstock.sampling import RequestPriority, SamplingParams
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
    search: BeamSearch | None = None
    origin: Sequence | None = None  # whose K/V the first sequence may go on from (a fork)
    sample_indices: Iterator[int] = field(default_factory=itertools.count)  # forks draw theirs from the same
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None


def new_request(
    request_id: str,
    prompt: Prompt,
    params: Params,
    priority: RequestPriority = RequestPriority.NORMAL,
    namespace: str = "",
    *,
    deadline: float | None = None,
    ttft_deadline: float | None = None,
) -> Request:
    """A request that arrives now; its deadlines are seconds from now. Raises `RequestError`."""
    now = time.monotonic()
    request = Request(
        id=request_id,
        prompt=prompt,
        params=check_params(params),
        channel=Channel(request_id),
        arrival=now,
        priority=priority_class(priority),
        namespace=namespace,
        reserved_tokens=estimate_tokens(prompt),
    )
    if deadline is not None:
        request.deadline = now + seconds("deadline", deadline)
    if ttft_deadline is not None:
        request.ttft_deadline = now + seconds("ttft_deadline", ttft_deadline)
    return request


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


def check_params(params: Params) -> Params:
    """The parameters. Raises `RequestError` for anything else."""
    if params is not None and not isinstance(params, SamplingParams | GenerationConfig):
        raise RequestError(f"params must be SamplingParams or GenerationConfig, got {type(params).__name__}")
    return params


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
