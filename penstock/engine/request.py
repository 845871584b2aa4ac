"""`Request`: the engine's own record of one call to `generate`, from the door to its terminal event.

Made on the caller's thread, handed over once, then touched by the engine's thread alone.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from penstock.engine.channel import Channel
from penstock.engine.collector import Collector
from penstock.engine.tokenizing import Prompt, check_keys, encode_prompt, needs_tokenizer
from penstock.errors import RequestError, described
from penstock.generation import GenerationConfig
from penstock.optimizers.beams import BeamSearch
from penstock.sampling import RequestPriority, SamplingParams
from penstock.scheduling.admission import Place
from penstock.sequence import Sequence
from penstock.values import integer, real, text

Params = SamplingParams | GenerationConfig | None


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """Times are seconds on the engine's clock; `place` is what it holds of the waiting room until it starts."""

    id: str
    prompt: Prompt
    params: Params
    channel: Channel
    arrival: float
    priority: RequestPriority = RequestPriority.NORMAL
    deadline: float = math.inf
    ttft_deadline: float = math.inf
    namespace: str = ""
    place: Place
    seed: int = 0  # drawn at submission, for parameters that bring none
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
    rank, due = priority_class(priority), now + seconds("deadline", deadline)
    return Request(
        id=request_id,
        prompt=prompt,
        params=check_params(params),
        channel=Channel(request_id, rank, due),
        arrival=now,
        priority=rank,
        deadline=due,
        ttft_deadline=now + seconds("ttft_deadline", ttft_deadline),
        namespace=text("namespace", namespace),
        place=Place(request_id, estimate_tokens(prompt), rank, due),
    )


def new_forks(request_ids: Iterable[str], origin: Channel, params: Params) -> list[Request]:
    """Requests that will go on from where the one of `origin` is, whose class and deadline they have."""
    params, now, num_tokens = check_params(params), time.monotonic(), len(origin.prompt_token_ids)
    return [
        Request(
            id=request_id,
            prompt=origin.prompt_token_ids,
            params=params,
            channel=Channel(request_id, origin.priority, origin.deadline),
            arrival=now,
            priority=origin.priority,
            deadline=origin.deadline,
            place=Place(request_id, num_tokens, origin.priority, origin.deadline),
        )
        for request_id in request_ids
    ]


def taken(prompt: Prompt) -> Prompt:
    """The prompt as it is now, whatever the caller does to it later, refused if it needs no tokenizer to be refused.

    Raises `RequestError`.
    """
    try:
        return _taken(prompt)
    except RequestError:
        raise
    except Exception as error:  # of an object that only looks like a prompt
        raise RequestError(f"the prompt cannot be read: {described(error)}") from error


def _taken(prompt: Prompt) -> Prompt:
    """As plain Python, so that nothing of the caller's runs on the engine's thread."""
    if isinstance(prompt, Mapping):
        check_keys(prompt)
        prompt = dict(prompt)
    if not needs_tokenizer(prompt):
        said, ids = encode_prompt(None, prompt)
        return {"prompt": said, "prompt_token_ids": ids}
    if not (prompt.get("prompt") if isinstance(prompt, dict) else prompt):
        raise RequestError("the prompt is empty: pass at least one character, or token ids")
    if isinstance(prompt, str):
        return str.__str__(prompt)
    if isinstance(prompt, dict):
        return {"prompt": text('"prompt"', prompt["prompt"])}
    copied: list[Any] = copy.deepcopy(list(prompt))
    return [dict(message) if isinstance(message, Mapping) else message for message in copied]


def estimate_tokens(prompt: Prompt) -> int:
    """About how many tokens a prompt has: exact for ids, a quarter of the characters for text."""
    if isinstance(prompt, str):
        return len(prompt) // 4 + 1
    if isinstance(prompt, Mapping):
        return estimate_tokens(prompt["prompt_token_ids" if "prompt_token_ids" in prompt else "prompt"])
    if needs_tokenizer(prompt):
        return sum(map(_num_characters, prompt)) // 4 + 1
    return len(prompt)


def _num_characters(message: object) -> int:
    try:
        return len(str(message))
    except Exception:  # what is in it is the chat template's business, on its own thread
        return 0


def check_params(params: Params) -> Params:
    """The parameters, as they are now. Raises `RequestError` for anything else."""
    if isinstance(params, GenerationConfig):
        return dataclasses.replace(params)  # checked anew: it can be assigned to
    if params is not None and not isinstance(params, SamplingParams):
        raise RequestError(f"params must be SamplingParams or GenerationConfig, got {type(params).__name__}")
    return params


def priority_class(priority: RequestPriority) -> RequestPriority:
    """The class of that number. Raises `RequestError`."""
    names = ", ".join(known.name for known in RequestPriority)
    number = integer("priority", priority, min(RequestPriority), max(RequestPriority), f"a RequestPriority ({names})")
    return RequestPriority(number)


def seconds(name: str, value: float | None) -> float:
    """The number; infinity for None. A time that has passed already is a deadline that is missed, not a mistake.

    Raises `RequestError`.
    """
    if value is None:
        return math.inf
    return real(name, value, -math.inf, math.inf, "seconds from now, a number that a float can hold")


def check_id(request_id: object) -> str:
    """The id of a request. Raises `RequestError` for what cannot be one."""
    return text("request_id", request_id)
