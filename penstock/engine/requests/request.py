"""`Request`: the engine's record of one call to `generate`, from submission to its terminal event.

Created on the caller's thread and handed over once; from then on only the engine's thread touches it. Each mutable
field has one writer, named beside it; all others are fixed at construction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from penstock.api.arguments import Arguments, check_id
from penstock.api.channel import Channel
from penstock.api.prompt import PromptInput
from penstock.engine.requests.collector import Collector
from penstock.errors import RequestError
from penstock.generation import Params
from penstock.optimizers.beam_search import BeamSearch
from penstock.sampling import RequestPriority
from penstock.scheduling.admission import QueuePlace
from penstock.sequence import Sequence


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """Times are seconds on the engine's clock; `place` is the place in the waiting queue until the request starts."""

    id: str
    prompt: PromptInput
    params: Params
    channel: Channel
    arrival: float
    priority: RequestPriority = RequestPriority.NORMAL
    deadline: float = math.inf
    ttft_deadline: float = math.inf
    namespace: str = ""
    adapter: str = ""  # its name; a fork has the adapter of its origin
    place: QueuePlace
    seed: int = 0  # for parameters without a seed
    origin: Sequence | None = None  # of a fork: the sequence whose K/V it continues from
    sample_indices: Iterator[int] = field(default_factory=itertools.count)  # shared with forks
    num_continued: int = 0  # of a fork: the last tokens of its prompt that its origin generated, or that were appended
    # Written by `InputProcessor.admit`:
    collector: Collector | None = None
    sequences: list[Sequence] = field(default_factory=list)
    search: BeamSearch | None = None
    # Written by `OutputProcessor`:
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None


def new_request(request_id: str, arguments: Arguments, seed: int = 0) -> Request:
    """A request that arrives now."""
    priority, deadline, num_tokens = arguments.priority, arguments.deadline, arguments.prompt.estimate_tokens()
    return Request(
        id=request_id,
        prompt=arguments.prompt,
        params=arguments.params,
        channel=Channel(request_id, priority, deadline),
        arrival=arguments.arrival,
        priority=priority,
        deadline=deadline,
        ttft_deadline=arguments.ttft_deadline,
        namespace=arguments.namespace,
        adapter=arguments.adapter,
        place=QueuePlace(request_id, num_tokens, priority, deadline),
        seed=seed,
    )


def unused_id(request_id: str | None, channels: Mapping[str, Channel]) -> str:
    """The id, or a fresh one for None. Raises `RequestError` while a request with this id runs."""
    request_id = check_id(request_id)
    if (channel := channels.get(request_id)) is not None and not channel.ended:
        raise RequestError(
            f"request id {request_id!r} is already running: use another, or none", parameter="request_id"
        )
    return request_id
