"""`Sequence`: the one mutable record of the engine, and who may write each field.

A sequence is (tokens, computed); everything else is a subtraction. There are no phases: prefill, chunked prefill,
decode, a cache hit, a rejected draft and a resumed victim are all "make `computed` catch up with `tokens`".
Written by `Scheduler` and `CacheManager` only, on the engine's thread; a test reads the syntax tree and holds us to it.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from enum import Enum

from penstock.sampling import RequestPriority, SamplingParams


class Status(Enum):
    """Where a sequence is. Legal moves: WAITING <-> RUNNING, and either -> FINISHED."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One stream of tokens: the prompt and what was generated after it.

    Times are seconds on the engine's clock. `max_len` is the length at which it ends (prompt plus new tokens).
    `stop_ids` holds every id that ends it (EOS unless ignored, stop ids); `seed` keys its randomness, together with
    `sample_index` and the position. `namespace` isolates prefix-cache sharing. `parent` is who it may share its
    prompt's blocks with: the first of its request's (n > 1), or the one that it was forked from, or None.
    """

    # Fixed at birth.
    id: int
    request_id: str
    params: SamplingParams
    tokens: list[int]  # prompt + accepted output; appended to by Scheduler.commit only
    max_len: int
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    sample_index: int = 0
    priority: RequestPriority = RequestPriority.NORMAL
    arrival: float = 0.0
    deadline: float = math.inf
    ttft_deadline: float = math.inf
    namespace: str = ""
    parent: Sequence | None = field(default=None, repr=False)
    prompt_len: int = field(init=False)

    # Written by the scheduler (see DESIGN table in docs/design.md); blocks by the cache manager.
    draft: tuple[int, ...] = ()  # proposed, unverified: Scheduler.offer; cleared by commit and preempt
    computed: int = 0  # tokens whose K/V is settled: Scheduler.commit, raised by a prefix hit, zeroed by preempt
    in_flight: int = 0  # tokens in the executing step: plan (+), commit and fail (-)
    blocks: array[int] = field(default_factory=lambda: array("i"))  # block table: CacheManager
    status: Status = Status.WAITING  # Scheduler._move
    reason: FinishReason | None = None  # Scheduler._move

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)

    @property
    def length(self) -> int:
        """Number of accepted tokens, prompt included."""
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        """Number of accepted output tokens."""
        return len(self.tokens) - self.prompt_len

    @property
    def width(self) -> int:
        """Sequences of its request that need each other in every step: the beams of its search, or itself."""
        return self.params.num_beams or 1

    @property
    def todo(self) -> int:
        """Number of tokens that still have to go through the model before the next sample."""
        return len(self.tokens) + len(self.draft) - self.computed - self.in_flight
