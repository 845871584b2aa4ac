"""`Request`: the engine's record of one call to `generate`, from submission to its terminal event.

Made on the caller's thread, handed over once, then touched by the engine's thread alone. Each field has one writer,
named beside it; the others are fixed when the request is made.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from penstock.api.arguments import check_params, check_priority, check_seconds
from penstock.api.channel import Channel
from penstock.api.prompt import Prompt, PromptInput, read_prompt
from penstock.engine.requests.collector import Collector
from penstock.generation import Params
from penstock.optimizers.beams import BeamSearch
from penstock.sampling import RequestPriority
from penstock.scheduling.admission import Place
from penstock.sequence import Sequence
from penstock.values import text


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """Times are seconds on the engine's clock; `place` is its place in the waiting queue until it starts."""

    id: str
    prompt: PromptInput
    params: Params
    channel: Channel
    arrival: float
    priority: RequestPriority = RequestPriority.NORMAL
    deadline: float = math.inf
    ttft_deadline: float = math.inf
    namespace: str = ""
    place: Place
    seed: int = 0  # for parameters that bring none
    origin: Sequence | None = None  # whose K/V the first sequence may continue from (a fork)
    sample_indices: Iterator[int] = field(default_factory=itertools.count)  # shared with forks
    # Written by `InputProcessor.admit`:
    collector: Collector | None = None
    sequences: list[Sequence] = field(default_factory=list)
    search: BeamSearch | None = None
    # Written by `OutputProcessor`:
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
    seed: int = 0,
) -> Request:
    """A request that arrives now; its deadlines are seconds from now. Raises `RequestError`."""
    now, prompt_input, priority = time.monotonic(), read_prompt(prompt), check_priority(priority)
    due = now + check_seconds("deadline", deadline)
    return Request(
        id=request_id,
        prompt=prompt_input,
        params=check_params(params),
        channel=Channel(request_id, priority, due),
        arrival=now,
        priority=priority,
        deadline=due,
        ttft_deadline=now + check_seconds("ttft_deadline", ttft_deadline),
        namespace=text("namespace", namespace),
        place=Place(request_id, prompt_input.estimate_tokens(), priority, due),
        seed=seed,
    )
